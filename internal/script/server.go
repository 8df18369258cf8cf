package script

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"
)

// maxBody bounds one request; agents send their whole conversation each time.
const maxBody = 64 << 20

// Request is one request as it arrived, and what was answered.
type Request struct {
	Method string
	Path   string // with the query
	Header http.Header
	Body   []byte
	Side   bool     // not part of a scripted conversation
	Tools  []string // offered to the model, in order; those of an MCP namespace as "mcp__server__tool"
	Turn   Turn     // zero for a side request
	Step   Step     // zero for a side request
	Input  int      // tokens, as reported to the client
	Output int
}

// Credential is the credential of the request: the value of x-api-key, else what
// follows "Bearer " in Authorization, else "".
func (r Request) Credential() string {
	if key := r.Header.Get("X-Api-Key"); key != "" {
		return key
	}
	token, _ := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
	return token
}

// Server is a scripted model endpoint. Make one with Anthropic or OpenAI.
type Server struct {
	model    Model
	protocol protocol
	stopped  context.Context
	stop     context.CancelFunc

	mu       sync.Mutex
	requests []Request
	changed  chan struct{} // closed and renewed with every request
}

// protocol is what a provider's API has of its own.
type protocol interface {
	// read says what a request is. For one of a conversation it sets Tools and
	// Turn and clears Side; for a side request of the inference path it returns
	// the schema of the JSON that is wanted, or nil.
	read(r *Request) (asked, error)
	// events is the streamed answer and its JSON form. The head of it, up to and
	// including events[0], is what a held answer sends.
	events(r *Request, a asked) ([]event, any, error)
	// fail is the body of an answer with an HTTP error status.
	fail(status int, message string) any
	// other answers what is not the inference path.
	other(r *Request) (status int, body any)
}

// asked is how an answer is wanted.
type asked struct {
	inference bool
	stream    bool
	model     string
	schema    json.RawMessage // of a side request
	code      bool            // OpenAI: tools are called by programs
}

// event is one server-sent event.
type event struct {
	name string
	data map[string]any
}

func newServer(m Model, p protocol) *Server {
	ctx, cancel := context.WithCancel(context.Background())
	return &Server{model: m, protocol: p, stopped: ctx, stop: cancel, changed: make(chan struct{})}
}

// Start listens on a free port of 127.0.0.1 and returns the base URL, without a
// path. stop ends the server, held answers too, and waits for it.
func (s *Server) Start() (url string, stop func(), err error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", nil, fmt.Errorf("scripted model: %w", err)
	}
	return "http://" + l.Addr().String(), s.Serve(l), nil
}

// Serve answers the connections of l. stop is that of Start.
func (s *Server) Serve(l net.Listener) (stop func()) {
	server := &http.Server{Handler: s, ReadHeaderTimeout: 10 * time.Second}
	served := make(chan struct{})
	go func() { defer close(served); _ = server.Serve(l) }()
	return func() {
		s.stop()
		ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
		defer cancel()
		if server.Shutdown(ctx) != nil {
			_ = server.Close()
		}
		<-served
	}
}

// Requests returns every request so far, in the order of their answers.
func (s *Server) Requests() []Request {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.requests)
}

// Conversation returns the requests that are not side requests.
func (s *Server) Conversation() []Request {
	return slices.DeleteFunc(s.Requests(), func(r Request) bool { return r.Side })
}

// Wait returns nil once until says yes to the requests so far, or an error when
// ctx ends first.
func (s *Server) Wait(ctx context.Context, until func([]Request) bool) error {
	for {
		s.mu.Lock()
		requests, changed := slices.Clone(s.requests), s.changed
		s.mu.Unlock()
		if until(requests) {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("scripted model, after %d requests: %w", len(requests), ctx.Err())
		case <-changed:
		}
	}
}

func (s *Server) record(r *Request) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.requests = append(s.requests, *r)
	close(s.changed)
	s.changed = make(chan struct{})
}

// ServeHTTP implements http.Handler. A request is recorded before its answer
// begins.
func (s *Server) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	body, err := io.ReadAll(http.MaxBytesReader(w, req.Body, maxBody))
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	r := &Request{
		Method: req.Method, Path: req.URL.RequestURI(), Header: req.Header.Clone(), Body: body,
		Side: true, Input: tokens(len(body)),
	}
	a, err := s.protocol.read(r)
	switch {
	case err != nil:
		s.record(r)
		writeJSON(w, http.StatusBadRequest, s.protocol.fail(http.StatusBadRequest, err.Error()))
		return
	case !a.inference:
		s.record(r)
		status, body := s.protocol.other(r)
		writeJSON(w, status, body)
		return
	case r.Side:
		text, err := json.Marshal(example(a.schema))
		if err != nil {
			panic(err) // example makes nothing that cannot be encoded
		}
		r.Step = Step{Text: string(text)}
	default:
		r.Step = s.model(r.Turn)
	}
	if r.Step.Status != 0 {
		s.record(r)
		writeJSON(w, r.Step.Status, s.protocol.fail(r.Step.Status, r.Step.Text))
		return
	}
	events, whole, err := s.protocol.events(r, a)
	if err != nil {
		s.record(r)
		writeJSON(w, http.StatusInternalServerError, s.protocol.fail(http.StatusInternalServerError, err.Error()))
		return
	}
	s.record(r)
	if !a.stream {
		if r.Step.Hold {
			s.hold(req.Context())
			return
		}
		writeJSON(w, http.StatusOK, whole)
		return
	}
	w.Header().Set("Content-Type", "text/event-stream; charset=utf-8")
	w.Header().Set("Cache-Control", "no-cache")
	for _, e := range events {
		data, err := json.Marshal(e.data)
		if err != nil {
			panic(err) // events are made of encoded arguments and text
		}
		if _, err := fmt.Fprintf(w, "event: %s\ndata: %s\n\n", e.name, data); err != nil {
			return // the client left
		}
		_ = http.NewResponseController(w).Flush()
		if r.Step.Hold {
			s.hold(req.Context())
			return
		}
	}
}

func (s *Server) hold(client context.Context) {
	select {
	case <-client.Done():
	case <-s.stopped.Done():
	}
}

func writeJSON(w http.ResponseWriter, status int, body any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	if body != nil {
		_ = json.NewEncoder(w).Encode(body)
	}
}
