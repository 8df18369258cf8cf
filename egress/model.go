package egress

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"cal/nucleus"
)

// Protocols of model providers.
const (
	protocolAnthropic = "anthropic"
	protocolOpenAI    = "openai"
)

// modelPaths is what passes, below the base URL: inference and the list of
// models. What is free costs nothing at the provider. version is the prefix that clients of the protocol put before it and
// that belongs to the base URL or not, as the provider's own clients have it.
var modelPaths = map[string]struct {
	version string
	paths   map[string]string // path -> method
}{
	protocolAnthropic: {"", map[string]string{
		"/v1/messages":              http.MethodPost,
		"/v1/messages/count_tokens": http.MethodPost,
		"/v1/models":                http.MethodGet,
	}},
	protocolOpenAI: {"/v1", map[string]string{
		"/responses":        http.MethodPost,
		"/chat/completions": http.MethodPost,
		"/models":           http.MethodGet,
	}},
}

var (
	// modelQuery are the parameters that pass.
	modelQuery = []string{"beta", "limit", "after", "after_id", "before", "before_id", "order", "client_version", "api-version"}

	// Fields of a request and of a response that pass, whole or by prefix. Not
	// among them: credentials, cookies, and what chooses or shows the account.
	modelRequestFields = []string{
		"accept", "content-type", "content-encoding", "user-agent", "anthropic-version", "anthropic-beta",
		"anthropic-dangerous-direct-browser-access", "openai-beta", "x-app", "x-stainless-*", "x-codex-*", "x-claude-code-*",
		"originator", "version", "session_id", "session-id", "thread_id", "thread-id", "conversation_id", "x-client-request-id", "idempotency-key",
	}
	modelResponseFields = []string{
		"content-type", "cache-control", "date", "etag", "request-id", "x-request-id", "retry-after", "retry-after-ms",
		"x-should-retry", "anthropic-ratelimit-*", "x-ratelimit-*", "openai-processing-ms", "openai-model", "openai-version",
		"x-codex-*", "x-models-etag", "x-reasoning-included",
	}
)

// ModelCall is one call to the model: its intent, and once Done its outcome.
type ModelCall struct {
	ID       string        `json:"id"`
	Pod      string        `json:"pod"`
	Session  string        `json:"session"`
	Protocol string        `json:"protocol"`
	Host     string        `json:"host"`
	Port     int           `json:"port"`
	Method   string        `json:"method"`
	Path     string        `json:"path"` // at the provider
	Done     bool          `json:"done"`
	Status   int           `json:"status,omitempty"` // HTTP, as the guest got it
	Model    string        `json:"model,omitempty"`  // as the provider named it
	Tokens   Tokens        `json:"tokens"`
	Sent     int64         `json:"sent"`     // bytes of the request's body
	Received int64         `json:"received"` // bytes of the response's body
	Took     time.Duration `json:"took"`
	Error    string        `json:"error,omitempty"` // why it has no answer, or not all of it

	Requested string `json:"requested,omitempty"` // the model that the request names, where it names one clearly
	Service   string `json:"service,omitempty"`   // the kind of service, as the provider named it
	Estimated bool   `json:"estimated,omitempty"` // Tokens is not all of it the provider's count, and more than was used
	Free      bool   `json:"-"`                   // the provider takes nothing for such a call

	size   int64 // of the request's body, as far as it is known before it is sent
	hidden bool  // the request's bytes do not bound what goes in
	images int64 // in the request
	asked  service

	most    int64 // tokens that may come of it; 0: nobody looked
	choices int64 // answers that are asked for at once
	stream  bool  // the answer is asked for as a stream
	apart   bool  // it is to be done in the background
}

// Route is the way to one model endpoint with its credential. Formatting it
// does not show the key.
type Route struct {
	protocol  string
	base      target // path without a trailing slash
	key       string
	bearer    bool
	transport *http.Transport
	slots     chan struct{} // one is held by each call under way
}

// maxCalls is how many calls of one pod are under way at once; more wait.
const maxCalls = 16

func (route *Route) String() string {
	return "model route to " + route.base.scheme + "://" + route.base.authority()
}
func (route *Route) GoString() string { return route.String() }

// Close drops the connections that the route keeps for its next call.
func (route *Route) Close() { route.transport.CloseIdleConnections() }

// NewRoute returns the route to the endpoint that the person named. Its base
// URL is https, or http on a loopback address; being named opens the address
// where it is written as one (or as localhost). A host name opens no forbidden
// range here either.
func (g *Gateway) NewRoute(m nucleus.Model) (*Route, error) {
	if _, ok := modelPaths[m.Protocol]; !ok {
		return nil, fmt.Errorf("model protocol %.20q is neither %s nor %s", m.Protocol, protocolAnthropic, protocolOpenAI)
	}
	base, err := parseTarget(m.BaseURL)
	if err != nil {
		// The URL may hold a password: it is not repeated.
		return nil, fmt.Errorf("model base URL: %w", errors.Unwrap(err))
	}
	switch {
	case base.query != "":
		return nil, errors.New("model base URL has a query")
	case base.scheme == "http" && !isLoopback(base.host):
		return nil, fmt.Errorf("model base URL: http to %s, which is not a loopback address; use https", base.host)
	}
	if strings.ContainsFunc(m.Key, func(c rune) bool { return c <= ' ' || c > '~' }) {
		return nil, errors.New("model key holds a character that no HTTP field can carry")
	}
	base.path = strings.TrimRight(base.path, "/")
	route := &Route{protocol: m.Protocol, base: base, key: m.Key, bearer: m.Bearer, slots: make(chan struct{}, maxCalls)}
	route.transport = &http.Transport{
		ForceAttemptHTTP2:      true,
		DisableCompression:     true,
		IdleConnTimeout:        90 * time.Second,
		MaxResponseHeaderBytes: maxAnswerHead,
		TLSHandshakeTimeout:    g.limits.Dial,
		TLSClientConfig:        &tls.Config{RootCAs: g.roots},
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return g.dialModel(ctx, base)
		},
	}
	return route, nil
}

func isLoopback(host string) bool {
	if host == "localhost" {
		return true
	}
	addr, err := netip.ParseAddr(host)
	return err == nil && addr.IsLoopback()
}

func (g *Gateway) dialModel(ctx context.Context, base target) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, g.limits.Dial)
	defer cancel()
	var addrs []netip.Addr
	if addr, err := netip.ParseAddr(base.host); err == nil {
		addrs = []netip.Addr{addr}
	} else if base.host == "localhost" { // RFC 6761, 6.3: never asked of a resolver
		addrs = []netip.Addr{netip.AddrFrom4([4]byte{127, 0, 0, 1}), netip.IPv6Loopback()}
	} else {
		var refused *refusal
		if addrs, refused = g.addresses(ctx, base.host, nil); refused != nil {
			return nil, refused.Error
		}
	}
	var err error
	for i, addr := range addrs {
		var conn net.Conn
		if conn, err = g.dial(ctx, netip.AddrPortFrom(addr, uint16(base.port)), len(addrs)-i); err == nil {
			return conn, nil
		}
	}
	return nil, err
}

// ServeModel serves one connection of a guest to its model: plain HTTP/1.1,
// inference paths only.
func (g *Gateway) ServeModel(ctx context.Context, conn net.Conn, peer Peer, route *Route) {
	g.serveHTTP(ctx, conn, peer, func(w http.ResponseWriter, r *http.Request) {
		path, refused := route.resolve(r)
		if refused != nil {
			refused.Operation = nucleus.NetConnect
			g.gate.Refused(r.Context(), Attempt{
				ID: nucleus.NewID("eg-"), Pod: peer.Pod, Session: peer.Session, Via: ViaModel,
				Host: route.base.host, Port: route.base.port, Method: r.Method, Path: shorten(r.URL.EscapedPath()),
			}, refused.Error)
			route.writeError(w, refused)
			return
		}
		call := ModelCall{
			ID: nucleus.NewID("mc-"), Pod: peer.Pod, Session: peer.Session, Protocol: route.protocol,
			Host: route.base.host, Port: route.base.port, Method: r.Method, Path: path,
		}
		// A path that costs is /messages, /responses or /chat/completions.
		call.Free = r.Method != http.MethodPost || strings.HasSuffix(path, "/count_tokens")
		g.callModel(w, r, route, call)
	})
}

func shorten(s string) string { return s[:min(len(s), 256)] }

// resolve returns the path at the provider for a request that may pass.
func (route *Route) resolve(r *http.Request) (string, *refusal) {
	path, ok := route.known(r.Method, r.URL.Path)
	// The path must have been written as it is read, and to this server.
	if !ok || r.URL.RawPath != "" || r.URL.Host != "" || !strings.HasPrefix(r.RequestURI, "/") {
		return "", refuse(nucleus.KindDenied, ruleModel, "%s %.80q does not pass: this route carries inference only", r.Method, r.URL.Path)
	}
	query, err := url.ParseQuery(r.URL.RawQuery)
	if err != nil || len(r.URL.RawQuery) > 1024 {
		return "", refuse(nucleus.KindDenied, ruleModel, "the query does not pass: malformed, or longer than 1024 bytes")
	}
	for name := range query {
		if !slices.Contains(modelQuery, name) {
			return "", refuse(nucleus.KindDenied, ruleModel, "query parameter %.40q does not pass", name)
		}
	}
	return route.base.path + path, nil
}

// known finds a path among those that pass: as it stands, or below the prefix
// of the protocol or of the base URL.
func (route *Route) known(method, path string) (string, bool) {
	allowed := modelPaths[route.protocol]
	for _, prefix := range []string{"", allowed.version, route.base.path} {
		if rest, below := strings.CutPrefix(path, prefix); below && allowed.paths[rest] == method && method != "" {
			return rest, true
		}
	}
	return "", false
}

// callModel admits, records, sends, streams and records again.
func (g *Gateway) callModel(w http.ResponseWriter, r *http.Request, route *Route, call ModelCall) {
	admit, cancel := context.WithTimeout(r.Context(), g.limits.ModelWait)
	defer cancel()
	select {
	case route.slots <- struct{}{}:
		defer func() { <-route.slots }()
	case <-admit.Done():
		route.writeError(w, refuse(nucleus.KindUnavailable, ruleLimit, "%d calls are under way, no more at once", maxCalls))
		return
	}
	began := g.now()
	body, err := g.readBody(w, r, &call)
	if err != nil {
		w.Header().Set("Connection", "close") // nobody waits for the rest
		route.writeError(w, modelFailure(err, nil, route))
		return
	}
	if err := g.gate.ModelCall(admit, call); err != nil {
		refused := unavailable(err, "the call could not be recorded")
		errors.As(err, &refused.Error)
		route.writeError(w, refused)
		return
	}
	var sent, received atomic.Int64
	usage := &usageCounter{}
	call.Status, err = g.relayModel(w, r, route, call.Path, body, &sent, &received, usage)
	usage.finish()
	call.Done, call.Took = true, g.now().Sub(began)
	call.Sent, call.Received = sent.Load(), received.Load()
	// What the provider refused, or never got, costs nothing; of the rest nobody else knows.
	if !call.Free && call.Sent > 0 && !usage.refused {
		call.Estimated = usage.estimate(call, err != nil)
	}
	service := usage.given(call.asked, call.Estimated).String()
	call.Tokens, call.Model, call.Service = usage.tokens, shorten(route.redact(usage.models())), shorten(route.redact(service))
	if err != nil {
		call.Error = route.redact(err.Error())
	}
	record, cancel := context.WithTimeout(context.WithoutCancel(r.Context()), g.limits.Decide)
	defer cancel()
	if err := g.gate.ModelCall(record, call); err != nil {
		slog.Error("the outcome of a model call could not be recorded", "call", call.ID, "error", err)
	}
}

// readBody reads the beginning of a request's body, mostly all of it, so that what the
// call may cost is known before it is made. It returns a body that begins with what was read.
func (g *Gateway) readBody(w http.ResponseWriter, r *http.Request, call *ModelCall) (*pacedBody, error) {
	control := http.NewResponseController(w)
	paced := &pacedBody{ReadCloser: http.MaxBytesReader(nil, r.Body, g.limits.ModelBody), control: control, limit: g.limits.Idle, touch: func() {}}
	if r.ContentLength == 0 || call.Free {
		return paced, nil
	}
	first, err := io.ReadAll(io.LimitReader(paced, maxRead))
	if err != nil {
		return nil, err
	}
	call.look(first, r.Header.Get("Content-Encoding") != "")
	if call.size = int64(len(first)); call.size == maxRead {
		call.size = max(r.ContentLength, maxRead)
		call.hidden = call.hidden || r.ContentLength < 0
	}
	paced.ReadCloser = resumed{io.MultiReader(bytes.NewReader(first), paced.ReadCloser), paced.ReadCloser}
	return paced, nil
}

// resumed is a body whose beginning was read before.
type resumed struct {
	io.Reader
	io.Closer
}

var errEncoded = errors.New("the provider's answer is compressed though identity was asked for")

func (g *Gateway) relayModel(w http.ResponseWriter, r *http.Request, route *Route, path string, body *pacedBody, sent, received *atomic.Int64, usage *usageCounter) (int, error) {
	ctx, cancel := context.WithCancelCause(r.Context())
	defer cancel(nil)
	idle := time.AfterFunc(g.limits.Idle, func() { cancel(errIdle) })
	defer idle.Stop()
	touch := func() { idle.Reset(g.limits.Idle) }
	control := http.NewResponseController(w)

	out := route.request(ctx, r, path)
	if r.ContentLength != 0 {
		out.ContentLength = r.ContentLength
		body.touch = touch
		defer body.stop()
		out.Body = counted{body, sent}
	}
	resp, err := route.transport.RoundTrip(out)
	if err != nil {
		refused := modelFailure(err, context.Cause(ctx), route)
		route.writeError(w, refused)
		return statusOf(refused.Kind), err
	}
	defer resp.Body.Close()
	usage.refused = resp.StatusCode/100 != 2
	if resp.StatusCode < 200 || resp.StatusCode/100 == 3 {
		err = fmt.Errorf("the provider answered with status %d, which is not followed", resp.StatusCode)
	} else if encoding := resp.Header.Get("Content-Encoding"); encoding != "" && encoding != "identity" {
		err = errEncoded // neither counted nor searched for the key
	}
	if err != nil {
		route.writeError(w, refuse(nucleus.KindFailed, ruleModel, "%v", err))
		return http.StatusBadGateway, err
	}
	for name, values := range resp.Header {
		if passes(name, modelResponseFields) {
			for _, value := range values {
				w.Header().Add(name, route.redact(value))
			}
		}
	}
	w.WriteHeader(resp.StatusCode)
	usage.stream = strings.HasPrefix(resp.Header.Get("Content-Type"), "text/event-stream")
	answer := touching{io.TeeReader(counted{resp.Body, received}, usage), touch}
	redacting := &redactor{to: w, key: route.secret()}
	err = copyBody(redacting, control, g.limits.Idle, answer)
	if e := redacting.finish(); err == nil {
		err = e
	}
	if err != nil {
		if cause := context.Cause(ctx); cause != nil {
			err = cause
		}
		abort(control)
	}
	return resp.StatusCode, err
}

// request is the guest's request as the provider gets it.
func (route *Route) request(ctx context.Context, r *http.Request, path string) *http.Request {
	to := route.base
	to.path, to.query = path, r.URL.RawQuery
	out := (&http.Request{
		Method: r.Method,
		URL:    &url.URL{Scheme: to.scheme, Host: joinHostPort(to.host, to.port), Path: to.path, RawQuery: to.query},
		Host:   to.authority(),
		Header: http.Header{"Accept-Encoding": {"identity"}, "User-Agent": {""}},
	}).WithContext(ctx)
	for name, values := range r.Header {
		if passes(name, modelRequestFields) {
			out.Header[name] = values
		}
	}
	switch {
	case route.key == "":
	case route.protocol == protocolAnthropic && !route.bearer:
		out.Header.Set("X-Api-Key", route.key)
	default:
		out.Header.Set("Authorization", "Bearer "+route.key)
	}
	return out
}

func passes(name string, fields []string) bool {
	name = strings.ToLower(name)
	return slices.ContainsFunc(fields, func(field string) bool {
		prefix, open := strings.CutSuffix(field, "*")
		return name == field || open && strings.HasPrefix(name, prefix)
	})
}

func modelFailure(err, cause error, route *Route) *refusal {
	var (
		large   *http.MaxBytesError
		refused *nucleus.Error
	)
	switch {
	case errors.As(err, &large):
		return refuse(nucleus.KindTooLarge, ruleModel, "request of more than %d bytes", large.Limit)
	case errors.As(err, &refused):
		return &refusal{refused, err}
	case cause != nil:
		err = cause
	}
	failure := failed(err, "calling the model at "+route.base.host)
	failure.Message = route.redact(failure.Message)
	return failure
}

// writeError answers in the shape of the provider's own errors, which the
// agent's client shows to its user.
func (route *Route) writeError(w http.ResponseWriter, r *refusal) {
	status := statusOf(r.Kind)
	message := "CAL: " + r.Message
	spent := r.Kind == nucleus.KindDenied && strings.HasPrefix(r.Rule, "budget.")
	if spent { // as the providers say it of an account, so that the client does not try again
		w.Header().Set("X-Should-Retry", "false")
		if route.protocol == protocolAnthropic {
			writeJSON(w, http.StatusPaymentRequired, map[string]any{"type": "error", "error": map[string]any{"type": "billing_error", "message": message}})
		} else {
			writeJSON(w, http.StatusTooManyRequests, map[string]any{"error": map[string]any{"message": message, "type": "insufficient_quota", "param": nil, "code": "insufficient_quota"}})
		}
		return
	}
	if route.protocol == protocolAnthropic {
		kind := map[int]string{
			http.StatusForbidden: "permission_error", http.StatusRequestEntityTooLarge: "request_too_large",
			http.StatusGatewayTimeout: "timeout_error",
		}[status]
		if kind == "" {
			kind = "api_error"
		}
		writeJSON(w, status, map[string]any{"type": "error", "error": map[string]any{"type": kind, "message": message}})
		return
	}
	writeJSON(w, status, map[string]any{"error": map[string]any{
		"message": message, "type": string(r.Kind), "param": nil, "code": r.Rule,
	}})
}

type counted struct {
	io.ReadCloser
	n *atomic.Int64
}

func (c counted) Read(p []byte) (int, error) {
	n, err := c.ReadCloser.Read(p)
	c.n.Add(int64(n))
	return n, err
}

type touching struct {
	io.Reader
	touch func()
}

func (t touching) Read(p []byte) (int, error) {
	n, err := t.Reader.Read(p)
	t.touch()
	return n, err
}
