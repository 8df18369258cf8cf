package node

import (
	"context"
	"encoding/json"
	"log/slog"
	"net"
	"net/http"
	"strconv"
	"sync"
	"time"

	"cal/approval"
	"cal/guest"
	"cal/node/client"
	"cal/nucleus"
	"cal/wire"
)

// authority is the name that requests to the node are signed for, on its socket and
// on the wire alike.
const authority = "nucleus"

// handler routes the API of api/openapi.yaml. It serves the socket and, for the agent
// inside, the wire; what a caller may do depends on its key alone.
func (n *Node) handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v1/healthz", n.health)
	mux.HandleFunc("GET /v1/pods", n.operator(n.listPods))
	mux.HandleFunc("POST /v1/pods", n.operator(n.createPod))
	mux.HandleFunc("POST /v1/plan", n.operator(n.planPod))
	mux.HandleFunc("GET /v1/pods/{id}", n.ofPod(n.getPod))
	mux.HandleFunc("DELETE /v1/pods/{id}", n.operator(n.deletePod))
	mux.HandleFunc("POST /v1/pods/{id}/resume", n.operator(n.resumePod))
	mux.HandleFunc("POST /v1/pods/{id}/tools/{operation}", n.ofPod(n.tool))
	mux.HandleFunc("POST /v1/pods/{id}/agent", n.operator(n.agent))
	mux.HandleFunc("POST /v1/pods/{id}/repos/{repo}/fetch", n.operator(n.fetch))
	mux.HandleFunc("DELETE /v1/workspaces/{name}", n.operator(n.deleteWorkspace))
	mux.HandleFunc("GET /v1/approvers", n.operator(n.listApprovers))
	mux.HandleFunc("POST /v1/approvers/confirmed", n.operator(n.confirmApprovers))
	mux.HandleFunc("POST /v1/stop", n.operator(n.stop))
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		wire.WriteError(w, nucleus.Errorf(nucleus.KindNotFound, "no route %s %s", r.Method, r.URL.Path))
	})
	return mux
}

// verified is a request whose signature has been checked.
type verified struct {
	laps   *laps
	caller wire.Caller
	body   []byte
	signed *wire.SignedRequest
}

type verifiedHandler func(w http.ResponseWriter, r *http.Request, v verified) error

func (n *Node) authenticated(w http.ResponseWriter, r *http.Request, next verifiedHandler) {
	var l laps
	l.begin()
	caller, body, signed, err := n.verifier.Verify(r, authority)
	l.lap("verify")
	if err == nil {
		err = next(w, r, verified{&l, caller, body, signed})
	}
	if err != nil {
		wire.WriteError(w, nucleus.AsError(err))
	}
}

// operator routes are for the person's own key.
func (n *Node) operator(next verifiedHandler) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		n.authenticated(w, r, func(w http.ResponseWriter, r *http.Request, v verified) error {
			if v.caller.Role != wire.Operator {
				return nucleus.Errorf(nucleus.KindForbidden, "%s %s is for the operator; key %s is an agent's", r.Method, r.URL.Path, v.caller.KeyID)
			}
			return n.using(w, r, v, next)
		})
	}
}

// ofPod routes are for the operator, for the agent of the pod itself, and for the agents of the
// pods above it, whose policies let them manage pods.
func (n *Node) ofPod(next verifiedHandler) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		n.authenticated(w, r, func(w http.ResponseWriter, r *http.Request, v verified) error {
			id := r.PathValue("id")
			if v.caller.Role != wire.Operator && v.caller.Pod != id && !n.manages(v.caller.Pod, id) {
				return nucleus.Errorf(nucleus.KindForbidden, "key %s belongs to pod %s, not to %s", v.caller.KeyID, v.caller.Pod, id)
			}
			if v.signed.Pod != id {
				return nucleus.Errorf(nucleus.KindForbidden, "the request is signed for pod %q, the path names %q", v.signed.Pod, id)
			}
			return n.using(w, r, v, next)
		})
	}
}

func (n *Node) health(w http.ResponseWriter, _ *http.Request) {
	health := client.Health{Status: "ok", Version: nucleus.Version, UnixMilli: n.config.Now().UnixMilli(), Era: n.verifier.Era(), Spare: n.spares.status(), RequireApprovals: n.config.RequireApprovals}
	if health.Era == "" {
		health.AdmitsFrom = n.verifier.Started.Unix() + 1
	}
	writeJSON(w, http.StatusOK, health)
}

func (n *Node) listPods(w http.ResponseWriter, _ *http.Request, _ verified) error {
	n.mu.Lock()
	pods := n.podList()
	n.mu.Unlock()
	list := []nucleus.PodStatus{}
	for _, p := range pods {
		list = append(list, p.status())
	}
	writeJSON(w, http.StatusOK, list)
	return nil
}

func (n *Node) createPod(w http.ResponseWriter, r *http.Request, v verified) error {
	var spec nucleus.PodSpec
	if err := nucleus.Strict(v.body, &spec); err != nil {
		return nucleus.Errorf(nucleus.KindInvalid, "pod spec: %v", err)
	}
	p, err := n.CreatePod(r.Context(), v.caller.KeyID, spec)
	if err != nil {
		return err
	}
	w.Header().Set("Server-Timing", p.laps.String())
	writeJSON(w, http.StatusCreated, p.status())
	return nil
}

func (n *Node) planPod(w http.ResponseWriter, r *http.Request, v verified) error {
	var spec nucleus.PodSpec
	if err := nucleus.Strict(v.body, &spec); err != nil {
		return nucleus.Errorf(nucleus.KindInvalid, "pod spec: %v", err)
	}
	p, err := n.PlanPod(r.Context(), spec)
	if err != nil {
		return err
	}
	writeJSON(w, http.StatusOK, p.status())
	return nil
}

func (n *Node) getPod(w http.ResponseWriter, r *http.Request, _ verified) error {
	p, err := n.pod(r.PathValue("id"))
	if err != nil {
		return err
	}
	writeJSON(w, http.StatusOK, p.status())
	return nil
}

func (n *Node) deletePod(w http.ResponseWriter, r *http.Request, v verified) error {
	if err := n.DeletePod(r.Context(), v.caller.KeyID, r.PathValue("id")); err != nil {
		return err
	}
	w.WriteHeader(http.StatusNoContent)
	return nil
}

func (n *Node) resumePod(w http.ResponseWriter, r *http.Request, v verified) error {
	if err := n.ResumePod(r.Context(), v.caller.KeyID, r.PathValue("id")); err != nil {
		return err
	}
	w.WriteHeader(http.StatusNoContent)
	return nil
}

// tool is POST /v1/pods/{id}/tools/{operation}: the body is the arguments. With
// "Upgrade: nucleus-stream" run_bash streams; see api/openapi.yaml.
func (n *Node) tool(w http.ResponseWriter, r *http.Request, v verified) error {
	p, err := n.pod(r.PathValue("id"))
	if err != nil {
		return err
	}
	req := request{caller: v.caller, signed: v.signed, args: v.body, laps: v.laps}
	if req.op = nucleus.Op(r.PathValue("operation")); !req.op.Valid() {
		return nucleus.Errorf(nucleus.KindInvalid, "unknown operation %q", r.PathValue("operation"))
	}
	if err := req.options(r); err != nil {
		return err
	}
	if r.Header.Get("Upgrade") != "" {
		return n.streamTool(w, r, p, req)
	}
	req.waiting = func(ask string) {
		if ask == "" { // the answer follows
			return
		}
		w.Header().Set(wire.AskHeader, ask)
		w.WriteHeader(http.StatusProcessing)
		w.Header().Del(wire.AskHeader)
	}
	ctx, cancel := context.WithCancel(r.Context())
	defer cancel()
	value, err := n.request(ctx, p, req)
	if err != nil {
		return err
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Server-Timing", v.laps.String())
	w.Write(value)
	return nil
}

// options reads the query: wait (seconds), ask, and for a stream terminal, rows, cols, stdin.
func (r *request) options(req *http.Request) error {
	for name, values := range req.URL.Query() {
		value := values[0]
		number, err := strconv.ParseUint(value, 10, 16)
		switch name {
		case "wait":
			r.until = time.Now().Add(min(time.Duration(number)*time.Second, askLife+askGrace))
		case "ask":
			if err := approval.CheckName("ask", value); err != nil || len(values) != 1 {
				return nucleus.Errorf(nucleus.KindInvalid, "parameter ask=%q: want the id of one ask", value)
			}
			r.ask = value
			continue
		case "terminal":
			r.call.Terminal = number == 1
		case "stdin":
			r.call.Stdin = number == 1
		case "rows":
			r.call.Rows = uint16(number)
		case "cols":
			r.call.Cols = uint16(number)
		default:
			return nucleus.Errorf(nucleus.KindInvalid, "unknown parameter %q", name)
		}
		if err != nil || len(values) != 1 {
			return nucleus.Errorf(nucleus.KindInvalid, "parameter %s=%q: want one number from 0 to 65535", name, value)
		}
	}
	return nil
}

func (n *Node) streamTool(w http.ResponseWriter, r *http.Request, p *Pod, req request) error {
	if req.op != nucleus.RunBash {
		return nucleus.Errorf(nucleus.KindInvalid, "%s cannot be streamed", req.op)
	}
	stream, err := wire.Upgrade(w, r)
	if err != nil {
		return err
	}
	defer stream.Close()
	// The connection is the stream's from here: errors travel in its result.
	ctx, cancel := context.WithCancel(context.WithoutCancel(r.Context()))
	defer cancel()
	req.stream, req.call.Stream = stream, true
	req.waiting = func(ask string) {
		stream.SetWriteDeadline(time.Now().Add(10 * time.Second))
		stream.SendJSON(wire.FrameJSON, client.Waiting{Ask: ask})
		stream.SetWriteDeadline(time.Time{})
	}
	value, err := n.request(ctx, p, req)
	result := client.StreamResult{Value: value}
	if err != nil {
		result.Error = nucleus.AsError(err)
	}
	stream.SetWriteDeadline(time.Now().Add(10 * time.Second))
	stream.SendJSON(wire.FrameResult, result)
	return nil
}

// agent starts the pod's agent, or joins it, on an upgraded connection.
func (n *Node) agent(w http.ResponseWriter, r *http.Request, v verified) error {
	p, err := n.pod(r.PathValue("id"))
	if err != nil {
		return err
	}
	var body client.AgentRequest
	if err := nucleus.Strict(v.body, &body); err != nil {
		return nucleus.Errorf(nucleus.KindInvalid, "agent request: %v", err)
	}
	agent := p.record.Spec.Agent
	if agent == nil {
		return nucleus.Errorf(nucleus.KindInvalid, "pod %s was made without an agent", p.record.ID)
	}
	if p.errandOf() != nil {
		return nucleus.Errorf(nucleus.KindConflict, "pod %s runs a sub-agent of pod %s, which gets what it says", p.record.ID, p.record.Sub.Parent)
	}
	stream, err := wire.Upgrade(w, r)
	if err != nil {
		return err
	}
	defer stream.Close()
	// The connection is the stream's from here: errors travel in its result.
	machine, start, err := n.openAgent(context.WithoutCancel(r.Context()), p, v.caller.KeyID, body, agent.Argv)
	if err != nil {
		sendExit(stream, nucleus.AsError(err))
		return nil
	}
	defer machine.Close()
	n.relayAgent(p, v.caller.KeyID, start, stream, machine)
	return nil
}

func sendExit(stream *wire.Stream, e *nucleus.Error) {
	stream.SetWriteDeadline(time.Now().Add(10 * time.Second))
	stream.SendJSON(wire.FrameResult, guest.AgentExit{ExitCode: -1, Error: e})
}

func (n *Node) fetch(w http.ResponseWriter, r *http.Request, v verified) error {
	p, err := n.pod(r.PathValue("id"))
	if err != nil {
		return err
	}
	fetched, err := n.fetchRepo(r.Context(), p, v.caller.KeyID, r.PathValue("repo"))
	if err != nil {
		return err
	}
	writeJSON(w, http.StatusOK, fetched)
	return nil
}

// stop ends the node; its machines wait for the next one.
func (n *Node) stop(w http.ResponseWriter, _ *http.Request, _ verified) error {
	w.WriteHeader(http.StatusAccepted)
	if n.config.Stop != nil {
		n.config.Stop()
	}
	return nil
}

func writeJSON(w http.ResponseWriter, status int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	if err := json.NewEncoder(w).Encode(v); err != nil {
		slog.Warn("an answer did not reach its caller", "error", err)
	}
}

// streamServer serves HTTP on streams of a wire.
type streamServer struct {
	server *http.Server
	conns  chan net.Conn
	done   chan struct{}
	once   sync.Once
}

func newStreamServer(h http.Handler) *streamServer {
	s := &streamServer{conns: make(chan net.Conn), done: make(chan struct{})}
	s.server = &http.Server{Handler: h, ReadHeaderTimeout: 10 * time.Second, IdleTimeout: 5 * time.Minute}
	go s.server.Serve(s)
	return s
}

func (s *streamServer) serve(conn net.Conn) {
	select {
	case s.conns <- conn:
	case <-s.done:
		conn.Close()
	}
}

func (s *streamServer) close() { s.server.Close() }

// Accept, Close and Addr make it a net.Listener.
func (s *streamServer) Accept() (net.Conn, error) {
	select {
	case conn := <-s.conns:
		return conn, nil
	case <-s.done:
		return nil, net.ErrClosed
	}
}

func (s *streamServer) Close() error   { s.once.Do(func() { close(s.done) }); return nil }
func (s *streamServer) Addr() net.Addr { return &net.UnixAddr{Name: "wire", Net: "wire"} }
