package guest

import (
	"context"
	"io"
	"net/http"
	"strings"
	"testing"

	"github.com/modelcontextprotocol/go-sdk/mcp"

	"cal/nucleus"
	"cal/wire"
)

// A call that waits for a person says so at once, to a client that asked to hear of its
// progress; and a call with the ask's id goes on waiting for that one.
func TestMCPWaitsForPerson(t *testing.T) {
	answered := make(chan struct{})
	seen := make(chan string, 4)
	l := machineWithNode(t, func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		seen <- r.URL.RawQuery + " " + string(body)
		if r.URL.Query().Has("ask") {
			io.WriteString(w, `{"path":"a","content":"done\n"}`)
			return
		}
		w.Header().Set(wire.AskHeader, "a-1")
		w.WriteHeader(http.StatusProcessing)
		w.Header().Del(wire.AskHeader)
		select {
		case <-answered:
		case <-r.Context().Done():
		}
		wire.WriteError(w, &nucleus.Error{Kind: nucleus.KindApproval, Ask: "a-1", Message: "call again"})
	})
	l.p.config.WaitAsk = 54
	told := make(chan string, 8)
	client := mcp.NewClient(&mcp.Implementation{Name: "test"}, &mcp.ClientOptions{
		ProgressNotificationHandler: func(_ context.Context, r *mcp.ProgressNotificationClientRequest) { told <- r.Params.Message },
	})
	ctx := deadline(t)
	session, err := client.Connect(ctx, &mcp.StreamableClientTransport{Endpoint: newEndpoint(t, l.p.mcpHandler()) + "/mcp"}, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer session.Close()
	params := &mcp.CallToolParams{Name: "read_files", Arguments: map[string]any{"path": "a"}}
	params.SetProgressToken("p-1")
	first := make(chan *mcp.CallToolResult, 1)
	go func() {
		r, err := session.CallTool(ctx, params)
		if err != nil {
			t.Error(err)
		}
		first <- r
	}()
	select {
	case message := <-told:
		if !strings.Contains(message, "cal approve a-1") {
			t.Errorf("told %q", message)
		}
	case r := <-first:
		t.Fatalf("answered before the person, and told nothing: %+v", r)
	}
	close(answered)
	if r := <-first; r == nil || !r.IsError || !strings.Contains(r.Content[0].(*mcp.TextContent).Text, `"ask":"a-1"`) {
		t.Errorf("got %+v", r)
	}
	if got := <-seen; got != `wait=54 {"path":"a"}` {
		t.Errorf("the node saw %s", got)
	}

	r, err := session.CallTool(ctx, &mcp.CallToolParams{Name: "read_files", Arguments: map[string]any{"path": "a", "ask": "a-1"}})
	if err != nil || r.IsError {
		t.Errorf("continued: %+v, %v", r, err)
	}
	if got := <-seen; got != `ask=a-1&wait=54 {"path":"a"}` {
		t.Errorf("the node saw %s", got)
	}
	r, err = session.CallTool(ctx, &mcp.CallToolParams{Name: "read_files", Arguments: map[string]any{"path": "a", "ask": 7}})
	if err == nil && !r.IsError {
		t.Errorf("a number for an ask: %+v", r)
	}
	if len(seen) > 0 {
		t.Errorf("the node saw %s", <-seen)
	}
}
