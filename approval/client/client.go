// Package client speaks with an authority over its unix socket: for the node,
// which asks and reads answers, and for the program at which a person decides.
//
// Nothing here can sign a grant: it hands on what was signed. What an answer is worth is found out by
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
	"net/http/httptrace"
	"net/url"
	"os"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"cal/approval"
	"cal/internal/peercred"
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
	Passkey   = "passkey"    // only authenticators that verify their owner
	Nobody    = "none"
)

// Info says who approves: every approver that can grant now.
type Info struct {
	Approvers []nucleus.Approver `json:"approvers"`
	Approvals string             `json:"approvals"` // SameUser or OtherUser
	Witness   string             `json:"witness"`   // audit.WitnessKey of its cosignatures
	Log       string             `json:"log"`       // audit.VerifierKey of its own log; empty: it hands none out
}

// By says how strong approvals by list are: as strong as its weakest. Another user's authority
// holds against more than a passkey at one's own, so that it is told first.
func (i Info) By(list []nucleus.Approver) string {
	switch {
	case len(list) == 0:
		return Nobody
	case i.Approvals != OtherUser && !slices.ContainsFunc(list, func(a nucleus.Approver) bool { return a.Kind != nucleus.ApproverPasskey }):
		return Passkey
	}
	return i.Approvals
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

	Task *nucleus.Task `json:"task,omitempty"` // good for more than one use
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
	Shed      bool       `json:"shed,omitempty"` // it has ended, and what it said was removed since
}

// SignedGrant is a grant as its approver has signed it.
type SignedGrant struct {
	Token string `json:"token"` // see approval.Verify
}

// Denial is a person's refusal of the ask with exactly this digest. Approver may be empty where
// there is only one.
type Denial struct {
	AskDigest string `json:"ask_sha256"`
	Approver  string `json:"approver,omitempty"`
	Reason    string `json:"reason,omitempty"`
}

// Use is one use of what was granted for an ask.
type Use struct {
	Permit string   `json:"permit"` // id of the permit that it is for
	Grants []string `json:"grants"` // ids of the grants that were verified
}

// The states of what was granted.
const (
	Unused = "unused"     // it can still be used, for the first time
	Open   = "open"       // a task with uses and time left, or a passage that was opened
	Spent  = "used"       // nothing is left of it
	Over   = "over"       // its time has passed
	Void   = Revoked      // it was taken back
	Partly = "incomplete" // more approvers have to grant
)

// Approval is what was granted for an ask, and what came of it.
type Approval struct {
	Ask     string           `json:"ask"`
	State   string           `json:"state"` // one of the states above
	Pod     string           `json:"pod"`
	Op      nucleus.Op       `json:"op"`
	Summary string           `json:"summary"`
	Need    int              `json:"need"`
	Grants  []Given          `json:"grants"` // without their tokens
	Task    *nucleus.Task    `json:"task,omitempty"`
	Passage *nucleus.Passage `json:"passage,omitempty"`
	Uses    []UseOf          `json:"uses"`
	Until   int64            `json:"until_ms"`           // when it ends, where nobody takes it back
	Ended   int64            `json:"ended_ms,omitempty"` // when it was taken back
	Reason  string           `json:"reason,omitempty"`   // why
	Shed    bool             `json:"shed,omitempty"`     // it has ended, and what was asked was removed since
}

// UseOf is one use. Outcome is a nucleus.Outcome status by the node's word, OutcomeUnknown as
// long as it has said none.
type UseOf struct {
	N       int    `json:"n"`
	Permit  string `json:"permit"`
	Used    int64  `json:"used_ms"`
	Outcome string `json:"outcome"`
}

// Revocation asks to take back what was granted for an ask, or all that was granted to a pod.
// ID is that of an ask, a grant or a pod.
type Revocation struct {
	ID     string `json:"id"`
	Reason string `json:"reason,omitempty"`
}

// RevokedNow says what was taken back. From the moment of the answer on no use of it begins, and
// with Closed no passage of it lets anything through; what had begun before stands in its uses.
// Closed is false where a node asked on to the end of the wait, somewhat more than Lease, and did not
// say that it knows: nothing says then what it has open.
type RevokedNow struct {
	Revoked []Approval `json:"revoked"`
	Closed  bool       `json:"closed"`
	Millis  int64      `json:"ms"` // how long it took until all was closed

	// Unrecorded says that it holds, and that the authority's log could not be written: the
	// entry follows, and nothing else is decided before.
	Unrecorded bool `json:"unrecorded,omitempty"`
}

// Withdrawal is a node's word that nobody waits any more for what a pod asked before a time.
type Withdrawal struct {
	Before int64  `json:"before_ms"`
	Reason string `json:"reason"`
}

// Outcome is a node's word on what came of a use.
type Outcome struct {
	Permit string `json:"permit"`
	Status string `json:"status"`
}

// Watched answers a watcher: what was taken back since its last answer, in order, and the number up
// to which it knows all then. The numbers are of one database: another one, begun anew, does not
// know what the one before took back, nor what it had granted.
type Watched struct {
	Database string   `json:"database"`
	Seq      int64    `json:"seq"`
	Revoked  []Voided `json:"revoked"`
}

// Voided is one approval that was taken back.
type Voided struct {
	Ask    string   `json:"ask"`
	Pod    string   `json:"pod"`
	Grants []string `json:"grants"`
	Reason string   `json:"reason"`
}

// A watcher asks again at once; the authority answers after WatchWait at the latest. What passages
// a node has opened stand only while its last word from the authority is younger than Lease: it
// counts from when it asked, the authority from when it was asked, so that after Lease without
// a question the authority knows that the node has closed them.
const (
	WatchWait = 3 * time.Second
	Lease     = 10 * time.Second
)

// Used says that it is use N of Of.
type Used struct {
	N  int `json:"n"`
	Of int `json:"of"`
}

// NewApprover is the key of one more approver, and the word of one who is there for it.
type NewApprover struct {
	Name    string         `json:"name"`
	Phrase  string         `json:"phrase"`     // see authority.Identity
	Key     []byte         `json:"public_key"` // Ed25519
	Sealed  []byte         `json:"sealed"`     // the private key: age, by the new approver's passphrase
	By      string         `json:"by"`
	Vouched nucleus.Signed `json:"vouched"` // an authority.Identity, by the key of By
}

// Removed says what went with an approver: the asks whose grants, not used yet, are void.
type Removed struct {
	Name    string   `json:"name"`
	Revoked []string `json:"revoked"`

	Unrecorded bool `json:"unrecorded,omitempty"` // as of RevokedNow
}

// Pod registers the keys that sign a pod's requests, key id -> key, and the approvers whose grants
// its machine knows, by name.
type Pod struct {
	Pod       string            `json:"pod"`
	Keys      map[string][]byte `json:"requester_keys"`
	Approvers []string          `json:"approvers,omitempty"` // none: whoever can approve
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

const (
	callTimeout = 30 * time.Second
	lookTimeout = 5 * time.Second // of what only looks something up
)

// Client is safe for use by several goroutines. Every error that came from the
// authority, or says that there is none, is a *nucleus.Error.
type Client struct {
	socket string
	http   http.Client
	own    func() int // the user that asks; os.Geteuid
}

// New returns a client of the authority at socket; nothing is dialled yet.
func New(socket string) *Client {
	c := &Client{socket: socket, own: os.Geteuid}
	c.http.Transport = &http.Transport{DialContext: c.dial, IdleConnTimeout: time.Minute}
	return c
}

// OfOtherUser returns a client of the same socket that says nothing on a connection whose other end
// is not another user's, and that user's where it is not AnyUser: each one is looked at before it
// carries anything, because what answers at a path can be replaced between two.
func (c *Client) OfOtherUser(uid int) *Client {
	strict := &Client{socket: c.socket, own: c.own}
	strict.http.Transport = &http.Transport{IdleConnTimeout: time.Minute, DialContext: func(ctx context.Context, network, address string) (net.Conn, error) {
		conn, err := c.dial(ctx, network, address)
		if err != nil {
			return nil, err
		}
		if err := c.otherUser(conn, uid); err != nil {
			return nil, errors.Join(err, conn.Close())
		}
		return conn, nil
	}}
	return strict
}

func (c *Client) dial(ctx context.Context, _, _ string) (net.Conn, error) {
	var dialer net.Dialer
	return dialer.DialContext(ctx, "unix", c.socket)
}

// Close closes idle connections.
func (c *Client) Close() { c.http.CloseIdleConnections() }

// Info says who approves. The keys are the authority's own word: compare them with
// those that are known. That they are another user's is its word and the kernel's, of the very
// connection that carried it: what one of them denies is the same user's.
func (c *Client) Info(ctx context.Context) (info Info, err error) {
	var whose error // of the last connection, where one that was idle had ended
	seen := httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{GotConn: func(got httptrace.GotConnInfo) { whose = c.otherUser(got.Conn, AnyUser) }})
	if err := c.call(seen, http.MethodGet, "/v1/info", nil, &info); err != nil {
		return Info{}, err
	}
	if whose != nil && info.Approvals == OtherUser {
		info.Approvals = SameUser
	}
	return info, nil
}

// MaxApprovals is how many approvals one answer holds at most.
const MaxApprovals = 1000

// ApprovalsOf chooses approvals.
type ApprovalsOf struct {
	Pod   string // "" for those of all
	All   bool   // what is used, over or taken back too
	Limit int    // the newest of so many, at most MaxApprovals; 0 for MaxApprovals
}

// Approvals lists what was granted, newest first.
func (c *Client) Approvals(ctx context.Context, of ApprovalsOf) (list []Approval, err error) {
	query := url.Values{"pod": {of.Pod}, "all": {strconv.FormatBool(of.All)}, "limit": {strconv.Itoa(of.Limit)}}
	return list, c.call(ctx, http.MethodGet, "/v1/approvals?"+query.Encode(), nil, &list)
}

// Revoke takes back what was granted. It returns when no use of it can begin any more and its
// passages are closed.
func (c *Client) Revoke(ctx context.Context, r Revocation) (now RevokedNow, err error) {
	return now, c.callFor(ctx, Lease+callTimeout, http.MethodPost, "/v1/revocations", r, &now)
}

// Watch waits for what is taken back after the last answer; the zero Watched begins.
func (c *Client) Watch(ctx context.Context, watcher string, last Watched) (w Watched, err error) {
	query := url.Values{"watcher": {watcher}, "database": {last.Database}, "after": {strconv.FormatInt(last.Seq, 10)}}
	return w, c.callFor(ctx, Lease/2, http.MethodGet, "/v1/revocations?"+query.Encode(), nil, &w)
}

// Withdraw takes back all that a pod asked, and what of it was granted and can still be used. It
// returns what was granted and is not any more.
func (c *Client) Withdraw(ctx context.Context, pod string, w Withdrawal) (gone []Approval, err error) {
	return gone, c.call(ctx, http.MethodPost, "/v1/pods/"+url.PathEscape(pod)+"/withdrawal", w, &gone)
}

// Report says what came of a use.
func (c *Client) Report(ctx context.Context, ask string, o Outcome) error {
	return c.call(ctx, http.MethodPost, askPath(ask)+"/outcomes", o, nil)
}

// What can be required of approvals. RequireOtherUser may name the user, as "other-user:990": then
// no other one will do.
const (
	RequireOtherUser = "other-user" // they come from another user of the host
	RequirePasskey   = "passkey"    // a passkey signs them
)

// AnyUser is any other user of the host.
const AnyUser = -1

// CheckRequirement refuses what cannot be required; "" requires nothing.
func CheckRequirement(require string) error {
	if require == "" || require == RequirePasskey {
		return nil
	}
	_, _, err := OtherUserOf(require)
	return err
}

// OtherUserOf says which other user requirements want, AnyUser or one; whether any does; and an
// error where two name different ones, or one is none.
func OtherUserOf(requirements ...string) (uid int, required bool, err error) {
	uid = AnyUser
	for _, require := range requirements {
		kind, named, pinned := strings.Cut(require, ":")
		switch {
		case require == "", require == RequirePasskey:
			continue
		case kind != RequireOtherUser:
			return AnyUser, true, nucleus.Errorf(nucleus.KindInvalid, "required approvals %q: want %q, with \":\" and a uid where it is to be this user's, or %q", require, RequireOtherUser, RequirePasskey)
		}
		required = true
		if !pinned {
			continue
		}
		n, err := strconv.Atoi(named)
		switch {
		case err != nil || n < 1 || strconv.Itoa(n) != named: // root is nobody's other user
			return AnyUser, true, nucleus.Errorf(nucleus.KindInvalid, "required approvals %q: %q is no uid of another user", require, named)
		case uid != AnyUser && uid != n:
			return AnyUser, true, nucleus.Errorf(nucleus.KindInvalid, "approvals of uid %d are required, and of uid %d", uid, n)
		}
		uid = n
	}
	return uid, required, nil
}

// Approvers says who can approve, if that satisfies all requirements; who does not is left out. That
// they are another user's the authority says, and so does the kernel of the connection on which it
// says that; for root nobody is, because root can be any user.
func (c *Client) Approvers(ctx context.Context, requirements ...string) (Info, error) {
	uid, other, err := OtherUserOf(requirements...)
	if err != nil {
		return Info{}, err
	}
	from := c
	if other {
		from = c.OfOtherUser(uid)
		defer from.Close()
	}
	info, err := from.Info(ctx)
	if err != nil {
		return Info{}, err
	}
	if from != c && info.Approvals != OtherUser {
		return Info{}, nucleus.Errorf(nucleus.KindUnavailable, "approvals of another user are required, and the authority at %s says %q of itself (how to run it as another user: doc/approvals.md)", c.socket, info.Approvals)
	}
	if slices.Contains(requirements, RequirePasskey) {
		info.Approvers = slices.DeleteFunc(info.Approvers, func(a nucleus.Approver) bool { return a.Kind != nucleus.ApproverPasskey })
		if len(info.Approvers) == 0 {
			return Info{}, nucleus.Errorf(nucleus.KindUnavailable, "approvals by passkey are required, and nobody has one (cal approve approver add NAME --passkey)")
		}
	}
	return info, nil
}

// otherUser refuses a connection whose other end is not another user's, or not that of want.
func (c *Client) otherUser(conn net.Conn, want int) error {
	uid, err := peercred.UID(conn)
	switch own := c.own(); {
	case err != nil:
		return nucleus.Errorf(nucleus.KindUnavailable, "whose authority answers at %s: %v", c.socket, err)
	case own == 0:
		return nucleus.Errorf(nucleus.KindUnavailable, "approvals of another user are required, and this node is root's, who can be any user: start it as an ordinary one")
	case uid == own:
		return nucleus.Errorf(nucleus.KindUnavailable, "approvals of another user are required, and the authority at %s is uid %d's like this node (how to run it as another user: doc/approvals.md)", c.socket, uid)
	case want != AnyUser && uid != want:
		return nucleus.Errorf(nucleus.KindUnavailable, "approvals of uid %d are required, and the authority at %s is uid %d's", want, c.socket, uid)
	}
	return nil
}

// AddApprover hands in the key of one more approver.
func (c *Client) AddApprover(ctx context.Context, a NewApprover) (made nucleus.Approver, err error) {
	return made, c.call(ctx, http.MethodPost, "/v1/approvers", a, &made)
}

// RemoveApprover takes an approver's key away for good, and revokes what it granted and was
// not used.
func (c *Client) RemoveApprover(ctx context.Context, name string) (gone Removed, err error) {
	return gone, c.call(ctx, http.MethodDelete, "/v1/approvers/"+url.PathEscape(name), nil, &gone)
}

// RegisterPod makes the keys of a pod's requesters known, and its approvers, once: the same
// again are accepted, others are a conflict.
func (c *Client) RegisterPod(ctx context.Context, pod string, keys map[string][]byte, approvers ...string) error {
	return c.call(ctx, http.MethodPost, "/v1/pods", Pod{pod, keys, approvers}, nil)
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

// Waits returns an error where the ask is not pending: nothing of it waits for a grant.
func (c *Client) Waits(ctx context.Context, id string) error {
	status, err := c.Status(ctx, id)
	if err == nil && status.State != Pending {
		err = nucleus.Errorf(nucleus.KindConflict, "ask %s is %s; nothing waits for a grant", approval.Plain(id), approval.Plain(status.State))
	}
	return err
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

// MaxListed is how many asks one answer holds at most: more than can be pending.
const MaxListed = 5000

// List returns the asks in a state, the newest MaxListed, oldest first; an empty state means all.
func (c *Client) List(ctx context.Context, state string) ([]Item, error) {
	return c.Newest(ctx, state, MaxListed)
}

// Newest is List of so many.
func (c *Client) Newest(ctx context.Context, state string, most int) (items []Item, err error) {
	query := url.Values{"state": {state}, "limit": {strconv.Itoa(most)}}
	return items, c.call(ctx, http.MethodGet, "/v1/asks?"+query.Encode(), nil, &items)
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

// Grant hands in a grant of an ask that an approver has signed.
func (c *Client) Grant(ctx context.Context, id, token string) (status Status, err error) {
	return status, c.call(ctx, http.MethodPost, askPath(id)+"/grant", SignedGrant{token}, &status)
}

// Deny refuses an ask: for all approvers, for good.
func (c *Client) Deny(ctx context.Context, id string, d Denial) (status Status, err error) {
	return status, c.call(ctx, http.MethodPost, askPath(id)+"/denial", d, &status)
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
	limit := callTimeout
	if method == http.MethodGet {
		limit = lookTimeout
	}
	return c.callFor(ctx, limit, method, path, in, out)
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
		var refused *nucleus.Error // of a connection
		if errors.As(err, &refused) {
			return refused
		}
		if ctx.Err() != nil {
			return unanswered{nucleus.Errorf(nucleus.KindUnavailable, "the authority at %s has not answered for %v: it hangs, or was stopped (it goes on after: kill -CONT, or ends after: kill)", c.socket, limit), ctx.Err()}
		}
		return unanswered{nucleus.Errorf(nucleus.KindUnavailable, "no authority answers at %s: %v", c.socket, cause(err)), cause(err)}
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

// unanswered is the error of a call without an answer, and why there is none.
type unanswered struct {
	said *nucleus.Error
	why  error
}

func (u unanswered) Error() string   { return u.said.Error() }
func (u unanswered) Unwrap() []error { return []error{u.said, u.why} }

// Absent reports whether err says that nothing listens: whoever starts an authority mends it.
func Absent(err error) bool {
	return errors.Is(err, syscall.ECONNREFUSED) || errors.Is(err, syscall.ENOENT) || errors.Is(err, syscall.ECONNRESET) // reset: it ended with the request in its queue
}

// Silent reports whether err says that an authority is there and does not answer.
func Silent(err error) bool { return errors.Is(err, context.DeadlineExceeded) }

func refusal(code int, raw []byte) error {
	var body struct {
		Error *nucleus.Error `json:"error"`
	}
	if err := nucleus.Strict(raw, &body); err != nil || body.Error == nil {
		return nucleus.Errorf(nucleus.KindUnavailable, "the authority answered %d %s", code, http.StatusText(code))
	}
	body.Error.Message = approval.Plain(body.Error.Message) // it is shown to a person
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
