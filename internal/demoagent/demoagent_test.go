package demoagent

import (
	"bytes"
	"context"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/modelcontextprotocol/go-sdk/mcp"

	"cal/internal/script"
)

type writeArgs struct {
	Path    string `json:"path"`
	Content string `json:"content"`
}

// tools is a real MCP server with one tool that works and one that is refused.
func tools(t *testing.T, wrote func(writeArgs)) string {
	t.Helper()
	server := mcp.NewServer(&mcp.Implementation{Name: "cal", Version: "1"}, nil)
	mcp.AddTool(server, &mcp.Tool{Name: "write_files"}, func(_ context.Context, _ *mcp.CallToolRequest, a writeArgs) (*mcp.CallToolResult, any, error) {
		wrote(a)
		return &mcp.CallToolResult{Content: []mcp.Content{&mcp.TextContent{Text: "wrote " + a.Path}}}, nil, nil
	})
	mcp.AddTool(server, &mcp.Tool{Name: "git_push"}, func(context.Context, *mcp.CallToolRequest, struct{}) (*mcp.CallToolResult, any, error) {
		return nil, nil, fmt.Errorf("refused\x1b[2J by rule trifecta")
	})
	web := httptest.NewServer(mcp.NewStreamableHTTPHandler(func(*http.Request) *mcp.Server { return server }, nil))
	t.Cleanup(web.Close)
	return web.URL
}

func endpoint(t *testing.T, m script.Model) (*script.Server, string) {
	t.Helper()
	server := script.Anthropic(m)
	url, stop, err := server.Start()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(stop)
	return server, url
}

func deadline(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	t.Cleanup(cancel)
	return ctx
}

func TestLoop(t *testing.T) {
	var wrote atomic.Value
	model, url := endpoint(t, script.Steps(
		script.Step{Text: "First the push.", Server: "cal", Tool: "git_push"},
		script.Step{Server: "cal", Tool: "no_such_tool", Args: map[string]any{"a": 1}},
		script.Step{Server: "cal", Tool: "write_files", Args: map[string]any{"path": "a/b", "content": "<&>"}},
		script.Step{Text: "Finished."},
	))
	var out bytes.Buffer
	err := Agent{ModelURL: url, Model: "m", Key: "placeholder", MCPURL: tools(t, func(a writeArgs) { wrote.Store(a) }), Prompt: "go", Out: &out}.Run(deadline(t))
	if err != nil {
		t.Fatal(err)
	}
	if got := wrote.Load(); got != (writeArgs{"a/b", "<&>"}) {
		t.Errorf("the tool got %v", got)
	}
	turns := model.Conversation()
	if len(turns) != 4 || len(turns[3].Turn.Results) != 3 {
		t.Fatalf("%d turns, want 4 with 3 results in the last", len(turns))
	}
	for i, want := range []struct {
		text  string
		error bool
	}{{"trifecta", true}, {"no_such_tool", true}, {"wrote a/b", false}} {
		if got := turns[3].Turn.Results[i]; got.Error != want.error || !strings.Contains(got.Text, want.text) {
			t.Errorf("result %d: %+v, want %+v", i, got, want)
		}
	}
	if got := turns[0].Turn.Prompt; got != "go" {
		t.Errorf("the model saw the prompt %q", got)
	}
	if got := turns[0].Credential(); got != "placeholder" {
		t.Errorf("the model got the credential %q", got)
	}
	if want := []string{"mcp__cal__git_push", "mcp__cal__write_files"}; fmt.Sprint(turns[0].Tools) != fmt.Sprint(want) {
		t.Errorf("the model was offered %v, want %v", turns[0].Tools, want)
	}
	for _, want := range []string{"agent: First the push.", "FAILED: refused.[2J by rule trifecta", "done: wrote a/b", "agent: Finished."} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("the screen lacks %q:\n%s", want, out.String())
		}
	}
}

func TestUnreachable(t *testing.T) {
	_, url := endpoint(t, script.Steps())
	_, refusing := endpoint(t, func(script.Turn) script.Step { return script.Step{Status: 401, Text: "bad key"} })
	mcpURL := tools(t, func(writeArgs) {})
	junk := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, `{"role":"assistant"}`) }))
	defer junk.Close()
	for _, c := range []struct{ name, model, mcp, want string }{
		{"no tools", url, "http://127.0.0.1:1/mcp", "connecting to the tools at http://127.0.0.1:1/mcp"},
		{"no model", "http://127.0.0.1:1", mcpURL, "asking the model at http://127.0.0.1:1"},
		{"model refuses", refusing, mcpURL, "bad key"},
		{"no message", junk.URL, mcpURL, "no message of an assistant"},
	} {
		err := Agent{ModelURL: c.model, MCPURL: c.mcp, Prompt: "go", Out: new(bytes.Buffer)}.Run(deadline(t))
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", c.name, err, c.want)
		}
	}
}

func TestHeldModelEndsWithContext(t *testing.T) {
	model, url := endpoint(t, script.Steps(script.Step{Hold: true}))
	ctx, cancel := context.WithCancel(deadline(t))
	mcpURL := tools(t, func(writeArgs) {})
	ended := make(chan error, 1)
	go func() {
		ended <- Agent{ModelURL: url, MCPURL: mcpURL, Prompt: "go", Out: new(bytes.Buffer)}.Run(ctx)
	}()
	if err := model.Wait(deadline(t), func(r []script.Request) bool { return len(r) == 1 }); err != nil {
		t.Fatal(err)
	}
	cancel()
	if err := <-ended; err == nil {
		t.Error("no error from a run that was ended")
	}
}
