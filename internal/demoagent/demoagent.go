// Package demoagent is the smallest honest coding agent: it asks a model for the
// next step, calls the MCP tool that the model names, gives back what came of it,
// and goes on until the model ends its turn.
//
// It has no tool of its own, opens no file and starts no process, and it believes
// neither side: answers have a size limit, and a tool that fails or is refused is
// told to the model like any other result. Nothing about any one script is in it,
// so what the demo shows is what the model asked for and the machine answered.
package demoagent

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"time"

	"github.com/modelcontextprotocol/go-sdk/mcp"
)

const (
	maxAnswer = 16 << 20 // bytes of one answer of the model
	maxSteps  = 500      // answers in one run
	maxShown  = 400      // bytes of one result on the screen

	// toolPrefix is how agents name the tools of an MCP server "cal" to a model.
	toolPrefix = "mcp__cal__"
)

// Agent is one run. Key may be a placeholder that is replaced on the way.
type Agent struct {
	ModelURL string // base URL of the Messages API, without /v1
	Model    string
	Key      string
	MCPURL   string    // streamable HTTP
	Prompt   string    // what the person wants
	Out      io.Writer // each step, for the person
}

// Run works until the model ends its turn. It returns an error when the model or
// the MCP server cannot be reached or answers what the protocol does not allow;
// a tool that fails is none.
func (a Agent) Run(ctx context.Context) error {
	client := mcp.NewClient(&mcp.Implementation{Name: "demoagent", Version: "1"}, nil)
	session, err := client.Connect(ctx, &mcp.StreamableClientTransport{Endpoint: a.MCPURL, MaxRetries: -1, DisableStandaloneSSE: true}, nil)
	if err != nil {
		return fmt.Errorf("connecting to the tools at %s: %w", a.MCPURL, err)
	}
	defer session.Close()
	tools, err := offered(ctx, session)
	if err != nil {
		return fmt.Errorf("listing the tools at %s: %w", a.MCPURL, err)
	}
	messages := []message{{Role: "user", Content: []block{{Type: "text", Text: a.Prompt}}}}
	for range maxSteps {
		answer, err := a.ask(ctx, request{Model: a.Model, MaxTokens: 8192, Messages: messages, Tools: tools})
		if err != nil {
			return fmt.Errorf("asking the model at %s: %w", a.ModelURL, err)
		}
		messages = append(messages, message{Role: "assistant", Content: answer.Content})
		var results []block
		for _, b := range answer.Content {
			switch b.Type {
			case "text":
				fmt.Fprintf(a.Out, "agent: %s\n", b.Text)
			case "tool_use":
				result := a.call(ctx, session, b)
				if ctx.Err() != nil {
					return ctx.Err()
				}
				results = append(results, result)
			}
		}
		if len(results) == 0 {
			return nil
		}
		messages = append(messages, message{Role: "user", Content: results})
	}
	return fmt.Errorf("the model gave %d answers without an end", maxSteps)
}

// The parts of the Messages API that are used.
type request struct {
	Model     string    `json:"model"`
	MaxTokens int       `json:"max_tokens"`
	Messages  []message `json:"messages"`
	Tools     []tool    `json:"tools"`
}

type tool struct {
	Name        string `json:"name"`
	Description string `json:"description,omitempty"`
	InputSchema any    `json:"input_schema"`
}

type message struct {
	Role    string  `json:"role"`
	Content []block `json:"content"`
}

type block struct {
	Type    string          `json:"type"`
	Text    string          `json:"text,omitempty"`
	ID      string          `json:"id,omitempty"`
	Name    string          `json:"name,omitempty"`
	Input   json.RawMessage `json:"input,omitempty"`
	UseID   string          `json:"tool_use_id,omitempty"`
	Content string          `json:"content,omitempty"`
	IsError bool            `json:"is_error,omitempty"`
}

func offered(ctx context.Context, session *mcp.ClientSession) ([]tool, error) {
	var tools []tool
	for t, err := range session.Tools(ctx, nil) {
		if err != nil {
			return nil, err
		}
		tools = append(tools, tool{toolPrefix + t.Name, t.Description, t.InputSchema})
	}
	return tools, nil
}

func (a Agent) ask(ctx context.Context, r request) (message, error) {
	body, err := json.Marshal(r)
	if err != nil {
		return message{}, err
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Minute)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, strings.TrimSuffix(a.ModelURL, "/")+"/v1/messages", bytes.NewReader(body))
	if err != nil {
		return message{}, err
	}
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("Anthropic-Version", "2023-06-01")
	req.Header.Set("X-Api-Key", a.Key)
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return message{}, err
	}
	defer resp.Body.Close()
	raw, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer+1))
	if err != nil {
		return message{}, err
	}
	if len(raw) > maxAnswer {
		return message{}, fmt.Errorf("its answer is longer than %d bytes", maxAnswer)
	}
	if resp.StatusCode != http.StatusOK {
		return message{}, fmt.Errorf("%s: %s", resp.Status, shown(string(raw)))
	}
	var answer message
	if err := json.Unmarshal(raw, &answer); err != nil {
		return message{}, err
	}
	if answer.Role != "assistant" || len(answer.Content) == 0 {
		return message{}, errors.New("its answer is no message of an assistant")
	}
	return answer, nil
}

// call does what one tool_use block asks and returns the tool_result block.
func (a Agent) call(ctx context.Context, session *mcp.ClientSession, use block) block {
	name := strings.TrimPrefix(use.Name, toolPrefix)
	fmt.Fprintf(a.Out, "tool:  %s %s\n", name, shown(string(use.Input)))
	result, err := session.CallTool(ctx, &mcp.CallToolParams{Name: name, Arguments: use.Input})
	if err != nil { // no such tool, or a connection that broke: the model is told
		result = &mcp.CallToolResult{IsError: true, Content: []mcp.Content{&mcp.TextContent{Text: err.Error()}}}
	}
	text, failed := flatten(result.Content), result.IsError
	word := "done"
	if failed {
		word = "FAILED"
	}
	fmt.Fprintf(a.Out, "       %s: %s\n", word, strings.ReplaceAll(shown(text), "\n", "\n       | "))
	return block{Type: "tool_result", UseID: use.ID, Content: text, IsError: failed}
}

// flatten is the text of a result; what is not text is given as its JSON.
func flatten(content []mcp.Content) string {
	var parts []string
	for _, c := range content {
		if text, ok := c.(*mcp.TextContent); ok {
			parts = append(parts, text.Text)
			continue
		}
		raw, err := json.Marshal(c)
		if err != nil {
			raw = fmt.Appendf(nil, "(content that cannot be shown: %v)", err)
		}
		parts = append(parts, string(raw))
	}
	return strings.Join(parts, "\n")
}

// shown is s for the screen: cut visibly, and without control characters, which
// a hostile page could use to draw what did not happen.
func shown(s string) string {
	cut := ""
	if len(s) > maxShown {
		cut = fmt.Sprintf(" ... (%d bytes)", len(s))
		s = strings.ToValidUTF8(s[:maxShown], "")
	}
	return strings.Map(func(r rune) rune {
		if r != '\n' && (r < ' ' || r >= 0x7f && r < 0xa0) {
			return '.'
		}
		return r
	}, strings.TrimRight(s, "\n")) + cut
}
