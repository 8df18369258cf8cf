// Package client speaks with an authority over its unix socket: for the node,
// which asks and reads answers, and for the program at which a person decides.
//
// Nothing here can grant. What an answer is worth is found out by
// approval.Verify against a key that the caller knows from elsewhere.
package client

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"time"

	"cal/approval"
	"cal/nucleus"
)

// The states of an ask.
const (
	Pending = "pending"
	Granted = "granted"
	Denied  = "denied"
	Expired = "expired" // too few decided in time

	Withdrawn = "withdrawn" // nobody waits for the answer any more
	Revoked   = "revoked"   // granted once, and void since
)

// Who approves, seen from the one who asks.
const (
	SameUser  = "same user"  // only the passphrase stands between asker and grant
	OtherUser = "other user" // the key belongs to another user of the host
)

// Info says who approves: every approver that can grant now.
type Info struct {
	Approvers []nucleus.Approver `json:"approvers"`
	Approvals string             `json:"approvals"` // SameUser or OtherUser
	Witness   string             `json:"witness"`   // audit.WitnessKey of its cosignatures
}

// Status is what came of an ask. It is pending until as many approvers as it needs have
// granted it, or one has denied. Reason is the one of who denied, or why it is no longer
// asked; a grant has its own.
type Status struct {
	ID        string  `json:"id"`
	State     string  `json:"state"`
	AskDigest string  `json:"ask_sha256"`
	Need      int     `json:"need"`             // how many approvers have to grant
	Grants    []Given `json:"grants,omitempty"` // so far, in the order in which they were given
	Reason    string  `json:"reason,omitempty"`
}

// Given is one approver's grant. Token is there once all have granted that are needed.
type Given struct {
	Grant    string `json:"grant"` // its id
	Approver string `json:"approver"`
	Reason   string `json:"reason,omitempty"`
	Given    int64  `json:"given_ms"`
	Token    string `json:"token,omitempty"`
}

// Tokens are what a permit holds for this ask: none before all are there.
func (s Status) Tokens() (tokens []string) {
	for _, g := range s.Grants {
		if g.Token != "" {
			tokens = append(tokens, g.Token)
		}
	}
	return tokens
}

// Item is one line of a listing. Summary is printable ASCII.
type Item struct {
	ID        string     `json:"id"`
	State     string     `json:"state"`
	Pod       string     `json:"pod"`
	Op        nucleus.Op `json:"op"`
	Summary   string     `json:"summary"`
	Need      int        `json:"need"`              // how many approvers have to grant
	Granted   []string   `json:"granted,omitempty"` // the approvers who have
	AskDigest string     `json:"ask_sha256"`
	Created   int64      `json:"created_ms"`
	Expires   int64      `json:"expires_ms"`
}

// Decision is a person's answer to the ask with exactly this digest. To approve takes the
// passphrase of the approver's key. Approver may be empty where there is only one.
type Decision struct {
	Approve    bool   `json:"approve"`
	Approver   string `json:"approver,omitempty"`
	AskDigest  string `json:"ask_sha256"`
	Reason     string `json:"reason,omitempty"`
	Passphrase string `json:"passphrase,omitempty"`
}

// Use is one use of what was granted for an ask.
type Use struct {
	Permit string   `json:"permit"` // id of the permit that it is for
	Grants []string `json:"grants"` // ids of the grants that were verified
}

// Used says that it is use N of Of.
type Used struct {
	N  int `json:"n"`
	Of int `json:"of"`
}

// NewApprover makes a key for one more approver, sealed with a passphrase of its own, on the
// word of one who is there.
type NewApprover struct {
	Name         string `json:"name"`
	Phrase       string `json:"phrase"` // see authority.Identity
	Passphrase   string `json:"passphrase"`
	By           string `json:"by"`
	ByPassphrase string `json:"by_passphrase"`
}

// Removed says what went with an approver: the asks whose grants, not used yet, are void.
type Removed struct {
	Name    string   `json:"name"`
	Revoked []string `json:"revoked"`
}

// Pod registers the keys that sign a pod's requests: key id -> key.
type Pod struct {
	Pod  string            `json:"pod"`
	Keys map[string][]byte `json:"requester_keys"`
}

// Log registers the key of a log that is to be witnessed, an audit.VerifierKey.
type Log struct {
	Key string `json:"key"`
}

// Witnessed is what the built-in witness keeps of a log.
type Witnessed struct {
	Origin     string `json:"origin"`
	Key        string `json:"key"`        // of the log
	Checkpoint string `json:"checkpoint"` // signed and cosigned; empty before the first
	Witness    string `json:"witness"`    // key of the witness
}

// WitnessPrefix is the path below which the authority is a C2SP tlog-witness;
// WitnessURL the submission prefix for a client that uses HTTP.
const (
	WitnessPrefix = "/v1/witness"
	WitnessURL    = "http://authority" + WitnessPrefix
)

// MaxWait is the longest that the authority holds one request open.
const MaxWait = 60 * time.Second

const callTimeout = 30 * time.Second

// Client is safe for use by several goroutines. Every error that came from the
// authority, or says that there is none, is a *nucleus.Error.
type Client struct {
	socket string
	http   http.Client
}

// New returns a client of the authority at socket; nothing is dialled yet.
func New(socket string) *Client {
	var dialer net.Dialer
	return &Client{socket: socket, http: http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return dialer.DialContext(ctx, "unix", socket)
		},
		IdleConnTimeout: time.Minute,
	}}}
}

// Close closes idle connections.
func (c *Client) Close() { c.http.CloseIdleConnections() }

// Info says who approves. The key is the authority's own word: compare it with
// the one that is known.
func (c *Client) Info(ctx context.Context) (info Info, err error) {
	return info, c.call(ctx, http.MethodGet, "/v1/info", nil, &info)
}

// AddApprover makes the key of one more approver.
func (c *Client) AddApprover(ctx context.Context, a NewApprover) (made nucleus.Approver, err error) {
	return made, c.call(ctx, http.MethodPost, "/v1/approvers", a, &made)
}

// RemoveApprover takes an approver's key away for good, and revokes what it granted and was
// not used.
func (c *Client) RemoveApprover(ctx context.Context, name string) (gone Removed, err error) {
	return gone, c.call(ctx, http.MethodDelete, "/v1/approvers/"+url.PathEscape(name), nil, &gone)
}

// RegisterPod makes the keys of a pod's requesters known, once: the same keys
// again are accepted, others are a conflict.
func (c *Client) RegisterPod(ctx context.Context, pod string, keys map[string][]byte) error {
	return c.call(ctx, http.MethodPost, "/v1/pods", Pod{pod, keys}, nil)
}

// Submit puts an ask before the authority; the same ask again is accepted.
func (c *Client) Submit(ctx context.Context, ask nucleus.AskRequest) (status Status, err error) {
	_, canonical, err := approval.Digest(ask)
	if err != nil {
		return Status{}, err
	}
	return status, c.call(ctx, http.MethodPost, "/v1/asks", json.RawMessage(canonical), &status)
}

// Status says at once what came of an ask.
func (c *Client) Status(ctx context.Context, id string) (status Status, err error) {
	return status, c.call(ctx, http.MethodGet, askPath(id), nil, &status)
}

// Wait returns when the ask is no longer pending, or with the error of ctx.
func (c *Client) Wait(ctx context.Context, id string) (Status, error) {
	for {
		var status Status
		seconds := strconv.Itoa(int(MaxWait / time.Second))
		err := c.callFor(ctx, MaxWait+callTimeout, http.MethodGet, askPath(id)+"?wait="+seconds, nil, &status)
		if err != nil || status.State != Pending {
			return status, err
		}
	}
}

// List returns the asks in a state, oldest first; an empty state means all.
func (c *Client) List(ctx context.Context, state string) (items []Item, err error) {
	return items, c.call(ctx, http.MethodGet, "/v1/asks?state="+url.QueryEscape(state), nil, &items)
}

// Get returns an ask with the digest recomputed from the bytes that came.
func (c *Client) Get(ctx context.Context, id string) (ask nucleus.AskRequest, digest string, err error) {
	var raw json.RawMessage
	if err := c.call(ctx, http.MethodGet, askPath(id)+"/bytes", nil, &raw); err != nil {
		return nucleus.AskRequest{}, "", err
	}
	ask, digest, _, err = approval.Parse(raw)
	if err == nil && ask.ID != id {
		err = fmt.Errorf("asked for %q, the authority sent %q", id, ask.ID)
	}
	return ask, digest, err
}

// Decide answers an ask.
func (c *Client) Decide(ctx context.Context, id string, d Decision) (status Status, err error) {
	return status, c.call(ctx, http.MethodPost, askPath(id)+"/decision", d, &status)
}

// Use claims one use of what was granted for an ask, before the effect. The authority counts
// and records it first; an error means that nothing may be done.
func (c *Client) Use(ctx context.Context, ask string, use Use) (used Used, err error) {
	return used, c.call(ctx, http.MethodPost, askPath(ask)+"/uses", use, &used)
}

// RegisterLog makes the key of a log known, once: the same key again is accepted,
// another is a conflict.
func (c *Client) RegisterLog(ctx context.Context, key string) error {
	return c.call(ctx, http.MethodPost, WitnessPrefix+"/logs", Log{key}, nil)
}

// Witnessed returns what the built-in witness keeps of a log.
func (c *Client) Witnessed(ctx context.Context, origin string) (w Witnessed, err error) {
	return w, c.call(ctx, http.MethodGet, WitnessPrefix+"/checkpoint?origin="+url.QueryEscape(origin), nil, &w)
}

// ForgetLog makes the built-in witness give up what it knows of a log.
func (c *Client) ForgetLog(ctx context.Context, origin string) error {
	return c.call(ctx, http.MethodDelete, WitnessPrefix+"/checkpoint?origin="+url.QueryEscape(origin), nil, nil)
}

// HTTP reaches the authority for whoever speaks C2SP with its witness.
func (c *Client) HTTP() *http.Client { return &c.http }

func askPath(id string) string { return "/v1/asks/" + url.PathEscape(id) }

func (c *Client) call(ctx context.Context, method, path string, in, out any) error {
	return c.callFor(ctx, callTimeout, method, path, in, out)
}

func (c *Client) callFor(parent context.Context, limit time.Duration, method, path string, in, out any) error {
	ctx, cancel := context.WithTimeout(parent, limit)
	defer cancel()
	var body bytes.Buffer
	if in != nil {
		enc := json.NewEncoder(&body)
		enc.SetEscapeHTML(false)
		if err := enc.Encode(in); err != nil {
			return err
		}
	}
	request, err := http.NewRequestWithContext(ctx, method, "http://authority"+path, &body)
	if err != nil {
		return err
	}
	request.Header.Set("Content-Type", "application/json")
	response, err := c.http.Do(request)
	if err != nil {
		if parent.Err() != nil {
			return parent.Err()
		}
		return nucleus.Errorf(nucleus.KindUnavailable, "no authority answers at %s: %v", c.socket, cause(err))
	}
	defer response.Body.Close()
	raw, err := io.ReadAll(io.LimitReader(response.Body, 2*approval.MaxAsk+1))
	switch {
	case err != nil && parent.Err() != nil:
		return parent.Err()
	case err != nil:
		return nucleus.Errorf(nucleus.KindUnavailable, "the authority at %s broke off: %v", c.socket, err)
	case len(raw) > 2*approval.MaxAsk:
		return nucleus.Errorf(nucleus.KindTooLarge, "the authority's answer is longer than %d bytes", 2*approval.MaxAsk)
	case response.StatusCode != http.StatusOK:
		return refusal(response.StatusCode, raw)
	case out == nil:
		return nil
	}
	return nucleus.Strict(raw, out)
}

func refusal(code int, raw []byte) error {
	var body struct {
		Error *nucleus.Error `json:"error"`
	}
	if err := nucleus.Strict(raw, &body); err != nil || body.Error == nil {
		return nucleus.Errorf(nucleus.KindUnavailable, "the authority answered %d %s", code, http.StatusText(code))
	}
	return body.Error
}

// cause takes away what net/http adds: the made-up URL.
func cause(err error) error {
	var u *url.Error
	if errors.As(err, &u) {
		return u.Err
	}
	return err
}
