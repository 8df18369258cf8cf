// Package client speaks the node's API for programs of the person: cal, the
// adapter, tests. It signs with the operator's key and holds nothing else.
package client

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"sync/atomic"
	"time"

	"cal/nucleus"
	"cal/wire"
)

// Client is a connection to one node.
type Client struct {
	socket string
	http   *http.Client
	signer wire.Signer
	era    atomic.Value // string, as the node named it last
}

// New returns a client for the node at a socket; nothing is dialled yet.
func New(socket string, keyID string, key ed25519.PrivateKey) *Client {
	return &Client{socket: socket, http: wire.UnixClient(socket), signer: wire.Signer{KeyID: keyID, Ed25519: key, Now: time.Now}}
}

// Waiting is a FrameJSON of a streamed operation: it waits for a person to answer this ask, or, with
// none, no longer.
type Waiting struct {
	Ask string `json:"ask"`
}

// StreamResult is the FrameResult that ends a streamed operation.
type StreamResult struct {
	Value json.RawMessage `json:"value,omitempty"`
	Error *nucleus.Error  `json:"error,omitempty"`
}

// AgentRequest is the body of POST /v1/pods/{id}/agent.
type AgentRequest struct {
	Attach bool   `json:"attach,omitempty"` // join the agent that runs
	TTY    bool   `json:"tty,omitempty"`
	Rows   uint16 `json:"rows,omitempty"`
	Cols   uint16 `json:"cols,omitempty"`
}

// AgentExit is the FrameResult of an agent's stream.
type AgentExit struct {
	ExitCode int            `json:"exit_code"`
	Error    *nucleus.Error `json:"error,omitempty"`
	Refused  bool           `json:"refused,omitempty"` // no agent was started
}

// RepoFetched is what a fetch from the machine brought.
type RepoFetched struct {
	Name     string `json:"name"`
	Branch   string `json:"branch"`
	Base     string `json:"base"`
	Head     string `json:"head"`
	Worktree string `json:"worktree"` // commit with what was not committed; Head when there is none
	Commits  int    `json:"commits"`
	Stat     string `json:"stat"` // diff stat, base to worktree
}

// Health is what GET /v1/healthz answers. Requests created before AdmitsFrom, in
// unix seconds, are refused: an earlier node may have admitted them. Where the node's
// clock was set back, Era is what nonces end with.
type Health struct {
	Status     string `json:"status"`
	Version    string `json:"version"`
	AdmitsFrom int64  `json:"admits_from"`
	Spare      string `json:"spare"`   // none, starting or ready: the machine made ahead
	UnixMilli  int64  `json:"unix_ms"` // the node's clock
	Era        string `json:"era,omitempty"`

	RequireApprovals string `json:"require_approvals,omitempty"` // of every pod
}

// Health says which node answers, or why none does.
func (c *Client) Health(ctx context.Context) (health Health, err error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://nucleus/v1/healthz", nil)
	if err != nil {
		return health, err
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return health, err
	}
	defer resp.Body.Close()
	if err := json.NewDecoder(resp.Body).Decode(&health); err != nil {
		return health, fmt.Errorf("%s does not speak like a node: %w", c.socket, err)
	}
	c.era.Store(health.Era)
	return health, nil
}

// CreatePod starts a machine and returns when it serves.
func (c *Client) CreatePod(ctx context.Context, spec nucleus.PodSpec) (nucleus.PodStatus, error) {
	var status nucleus.PodStatus
	return status, c.do(ctx, http.MethodPost, "/v1/pods", "", spec, &status)
}

// PlanPod says what CreatePod would make of spec; nothing is begun.
func (c *Client) PlanPod(ctx context.Context, spec nucleus.PodSpec) (nucleus.PodStatus, error) {
	var status nucleus.PodStatus
	return status, c.do(ctx, http.MethodPost, "/v1/plan", "", spec, &status)
}

// TimedPod is CreatePod, with what the node says of its parts (W3C Server Timing).
func (c *Client) TimedPod(ctx context.Context, spec nucleus.PodSpec) (status nucleus.PodStatus, timing string, err error) {
	header, err := c.exchange(ctx, http.MethodPost, "/v1/pods", "", spec, &status)
	return status, header.Get("Server-Timing"), err
}

// Pods lists the pods of the node.
func (c *Client) Pods(ctx context.Context) ([]nucleus.PodStatus, error) {
	var list []nucleus.PodStatus
	return list, c.do(ctx, http.MethodGet, "/v1/pods", "", nil, &list)
}

// Pod returns one pod.
func (c *Client) Pod(ctx context.Context, id string) (nucleus.PodStatus, error) {
	var status nucleus.PodStatus
	return status, c.do(ctx, http.MethodGet, "/v1/pods/"+id, id, nil, &status)
}

// DeletePod stops a machine; a named workspace stays.
func (c *Client) DeletePod(ctx context.Context, id string) error {
	return c.do(ctx, http.MethodDelete, "/v1/pods/"+id, id, nil, nil)
}

// ResumePod lets a machine go on that was paused for exceeding a watched limit.
func (c *Client) ResumePod(ctx context.Context, id string) error {
	return c.do(ctx, http.MethodPost, "/v1/pods/"+id+"/resume", id, nil, nil)
}

// DeleteWorkspace removes a named workspace that no machine uses, and all that is in it.
func (c *Client) DeleteWorkspace(ctx context.Context, name string) error {
	return c.do(ctx, http.MethodDelete, "/v1/workspaces/"+url.PathEscape(name), "", nil, nil)
}

// Approvers lists who can approve now, and whom of them the person has confirmed.
func (c *Client) Approvers(ctx context.Context) (list []nucleus.KnownApprover, err error) {
	return list, c.do(ctx, http.MethodGet, "/v1/approvers", "", nil, &list)
}

// ConfirmApprovers is the person's word that exactly these keys are the approvers' that they name.
func (c *Client) ConfirmApprovers(ctx context.Context, list []nucleus.Approver) error {
	return c.do(ctx, http.MethodPost, "/v1/approvers/confirmed", "", list, nil)
}

// Stop ends the node; its machines wait a minute for the next one.
func (c *Client) Stop(ctx context.Context) error {
	return c.do(ctx, http.MethodPost, "/v1/stop", "", nil, nil)
}

// Tool performs one operation and returns its result document.
func (c *Client) Tool(ctx context.Context, pod string, op nucleus.Op, args any) (json.RawMessage, error) {
	var value json.RawMessage
	return value, c.do(ctx, http.MethodPost, fmt.Sprintf("/v1/pods/%s/tools/%s", pod, op), pod, args, &value)
}

// ToolWithin is Tool for a caller that waits for a person, at most for wait.
func (c *Client) ToolWithin(ctx context.Context, pod string, op nucleus.Op, args any, wait time.Duration) (json.RawMessage, error) {
	var value json.RawMessage
	return value, c.do(ctx, http.MethodPost, fmt.Sprintf("/v1/pods/%s/tools/%s?wait=%d", pod, op, int(wait.Seconds())), pod, args, &value)
}

// TimedTool is Tool, with what the node says of its parts (W3C Server Timing).
func (c *Client) TimedTool(ctx context.Context, pod string, op nucleus.Op, args any) (value json.RawMessage, timing string, err error) {
	header, err := c.exchange(ctx, http.MethodPost, fmt.Sprintf("/v1/pods/%s/tools/%s", pod, op), pod, args, &value)
	return value, header.Get("Server-Timing"), err
}

// FetchRepo brings a repository's branch out of the machine into quarantine.
func (c *Client) FetchRepo(ctx context.Context, pod, repo string) (RepoFetched, error) {
	var fetched RepoFetched
	return fetched, c.do(ctx, http.MethodPost, fmt.Sprintf("/v1/pods/%s/repos/%s/fetch", pod, repo), pod, nil, &fetched)
}

// Terminal is how a streamed command is shown.
type Terminal struct {
	TTY, Stdin bool
	Rows, Cols uint16
}

// Run starts run_bash on a stream of frames; see nucleus and wire. Where it needs an approval it
// waits until a person has answered or the ask has expired, and says so with Waiting.
func (c *Client) Run(ctx context.Context, pod string, args any, t Terminal) (*wire.Stream, error) {
	path := fmt.Sprintf("/v1/pods/%s/tools/run_bash?wait=960&terminal=%d&stdin=%d&rows=%d&cols=%d", pod, digit(t.TTY), digit(t.Stdin), t.Rows, t.Cols)
	return c.upgrade(ctx, path, pod, args)
}

// Agent starts or joins the pod's agent on a stream of frames.
func (c *Client) Agent(ctx context.Context, pod string, req AgentRequest) (*wire.Stream, error) {
	return c.upgrade(ctx, "/v1/pods/"+pod+"/agent", pod, req)
}

func digit(b bool) int {
	if b {
		return 1
	}
	return 0
}

func (c *Client) request(ctx context.Context, method, path, pod string, body any) (*http.Request, error) {
	var raw []byte
	if body != nil {
		var err error
		if raw, err = json.Marshal(body); err != nil {
			return nil, err
		}
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://nucleus"+path, bytes.NewReader(raw))
	if err != nil {
		return nil, err
	}
	req.GetBody = nil // a request is signed for one use: it is never sent twice
	signer := c.signer
	signer.Era, _ = c.era.Load().(string)
	return req, signer.Sign(req, pod, raw)
}

// again reports whether a request that the node took for none of ours is worth a second
// signature: the node's clock was set back meanwhile.
func (c *Client) again(ctx context.Context, err error) bool {
	if err == nil || nucleus.AsError(err).Kind != nucleus.KindUnauthenticated {
		return false
	}
	before, _ := c.era.Load().(string)
	health, err := c.Health(ctx)
	return err == nil && health.Era != before
}

func (c *Client) do(ctx context.Context, method, path, pod string, body, answer any) error {
	_, err := c.exchange(ctx, method, path, pod, body, answer)
	return err
}

func (c *Client) exchange(ctx context.Context, method, path, pod string, body, answer any) (http.Header, error) {
	header, err := c.once(ctx, method, path, pod, body, answer)
	if c.again(ctx, err) {
		return c.once(ctx, method, path, pod, body, answer)
	}
	return header, err
}

func (c *Client) once(ctx context.Context, method, path, pod string, body, answer any) (http.Header, error) {
	req, err := c.request(ctx, method, path, pod, body)
	if err != nil {
		return nil, err
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return nil, nucleus.Errorf(nucleus.KindUnavailable, "the node at %s cannot be reached: %v", c.socket, err)
	}
	defer resp.Body.Close()
	if resp.StatusCode >= 300 {
		return nil, wire.ReadError(resp)
	}
	if answer == nil {
		return resp.Header, nil
	}
	return resp.Header, json.NewDecoder(resp.Body).Decode(answer)
}

func (c *Client) upgrade(ctx context.Context, path, pod string, body any) (*wire.Stream, error) {
	stream, err := c.upgradeOnce(ctx, path, pod, body)
	if c.again(ctx, err) {
		return c.upgradeOnce(ctx, path, pod, body)
	}
	return stream, err
}

func (c *Client) upgradeOnce(ctx context.Context, path, pod string, body any) (*wire.Stream, error) {
	req, err := c.request(ctx, http.MethodPost, path, pod, body)
	if err != nil {
		return nil, err
	}
	dial := func(ctx context.Context) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", c.socket)
	}
	return wire.DialUpgrade(ctx, dial, req)
}
