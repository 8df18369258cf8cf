package guest

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/textproto"
	"net/url"
	"strconv"
	"strings"

	"github.com/modelcontextprotocol/go-sdk/mcp"

	"cal/guest/tools"
	"cal/nucleus"
	"cal/policy"
	"cal/wire"
)

// mcpHandler serves the agent's tools. Each call becomes a signed request to the
// node, which decides; nothing is done here.
func (p *Proxy) mcpHandler() http.Handler {
	client := p.api()
	server := mcp.NewServer(&mcp.Implementation{Name: "cal", Version: Version}, nil)
	for _, tool := range tools.Describe() {
		if op := nucleus.Op(tool.Name); op.Delegates() && p.policy.Level(op) == policy.Never {
			continue // long, and of no use to most agents
		}
		server.AddTool(&mcp.Tool{Name: tool.Name, Description: tool.Description, InputSchema: tool.InputSchema},
			func(ctx context.Context, req *mcp.CallToolRequest) (*mcp.CallToolResult, error) {
				told, stop := tell(ctx, req)
				defer stop()
				return p.callTool(ctx, client, req.Params.Name, req.Params.Arguments, told), nil
			})
	}
	handler := mcp.NewStreamableHTTPHandler(func(*http.Request) *mcp.Server { return server }, nil)
	mux := http.NewServeMux()
	mux.Handle("/mcp", http.MaxBytesHandler(handler, tools.MaxArgs+1<<20))
	return mux
}

// serveMCP ends with its listener.
func serveMCP(l net.Listener, h http.Handler) {
	server := &http.Server{Handler: h, ReadHeaderTimeout: bootDeadline}
	if err := server.Serve(l); err != nil && !errors.Is(err, net.ErrClosed) {
		slog.Error("the tools' endpoint ended", "error", err)
	}
}

// callTool asks the node for one operation and waits for a person nearly as long as the
// agent's client does. waiting is told the id of the ask that is waited for.
func (p *Proxy) callTool(ctx context.Context, client *http.Client, name string, args json.RawMessage, waiting func(ask string)) *mcp.CallToolResult {
	c := toolCall{pod: p.boot.Pod, waiting: waiting}
	var value json.RawMessage
	ask, args, err := tools.Continued(args)
	if err == nil {
		c.op, c.args, err = tools.Operation(name, args)
		c.ask = ask
	}
	if err == nil && c.op == nucleus.ManagePods {
		c.op, c.args, c.pod, err = p.inPod(c.op, c.args)
	}
	if err == nil {
		value, err = p.request(ctx, client, c)
	}
	if err != nil {
		e := nucleus.AsError(err)
		text, _ := json.Marshal(struct {
			Error *nucleus.Error `json:"error"`
		}{e})
		return &mcp.CallToolResult{IsError: true, Content: []mcp.Content{&mcp.TextContent{Text: string(text)}}}
	}
	return &mcp.CallToolResult{Content: toolContent(c.op, value)}
}

// toolCall is one request to the node.
type toolCall struct {
	pod     string
	op      nucleus.Op
	args    json.RawMessage
	ask     string           // that it goes on waiting for, or empty
	waiting func(ask string) // nil: nobody is told
}

// inPod turns a call of a tool in a pod below this one into the request that it is: the
// node decides it under that pod's policy.
func (p *Proxy) inPod(op nucleus.Op, args json.RawMessage) (nucleus.Op, json.RawMessage, string, error) {
	decoded, err := tools.Decode(op, args)
	if err != nil {
		return op, nil, "", err
	}
	call := decoded.(tools.PodsArgs)
	if call.Action != tools.SubCall {
		return op, args, p.boot.Pod, nil
	}
	inner, args, err := tools.Operation(call.Operation, call.Arguments)
	return inner, args, call.Pod, err
}

func (p *Proxy) request(ctx context.Context, client *http.Client, c toolCall) (json.RawMessage, error) {
	value, err := p.requestOnce(ctx, client, c)
	if err == nil || nucleus.AsError(err).Kind != nucleus.KindUnauthenticated {
		return value, err
	}
	// The host's clock was set, or went on while everything here stood still.
	if askErr := p.askTime(ctx, client); askErr != nil {
		return nil, err
	}
	return p.requestOnce(ctx, client, c)
}

// askTime asks the node what its wall clock shows, and the era that its requests are
// signed for.
func (p *Proxy) askTime(ctx context.Context, client *http.Client) error {
	ctx, cancel := context.WithTimeout(ctx, bootDeadline)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://nucleus/v1/healthz", nil)
	if err != nil {
		return err
	}
	resp, err := client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	var health struct {
		UnixMilli int64  `json:"unix_ms"`
		Era       string `json:"era"`
	}
	if err := json.NewDecoder(io.LimitReader(resp.Body, 64<<10)).Decode(&health); err != nil {
		return err
	}
	p.clock.set(health.UnixMilli)
	p.era.Store(health.Era)
	return nil
}

// signer signs for this boot: what is sent to the node, and what the node is to show
// others.
func (p *Proxy) signer() wire.Signer {
	signer := wire.Signer{KeyID: p.boot.Boot, Ed25519: p.key, Now: p.clock.time}
	signer.Era, _ = p.era.Load().(string)
	return signer
}

func (p *Proxy) requestOnce(ctx context.Context, client *http.Client, c toolCall) (json.RawMessage, error) {
	query := url.Values{"wait": {strconv.Itoa(p.config.WaitAsk)}}
	if c.ask != "" {
		query.Set("ask", c.ask)
	}
	if c.waiting != nil {
		ctx = httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{Got1xxResponse: func(code int, header textproto.MIMEHeader) error {
			if code == http.StatusProcessing {
				c.waiting(header.Get(wire.AskHeader))
			}
			return nil
		}})
	}
	target := fmt.Sprintf("http://nucleus/v1/pods/%s/tools/%s?%s", c.pod, c.op, query.Encode())
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, target, bytes.NewReader(c.args))
	if err != nil {
		return nil, err
	}
	req.GetBody = nil // signed for one use: never sent twice
	req.Header.Set("Content-Type", "application/json")
	signer := p.signer()
	if err := signer.Sign(req, c.pod, c.args); err != nil {
		return nil, err
	}
	resp, err := client.Do(req)
	if err != nil {
		return nil, nucleus.Errorf(nucleus.KindUnavailable, "the node cannot be reached: %v", err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return nil, wire.ReadError(resp)
	}
	return io.ReadAll(io.LimitReader(resp.Body, maxResult))
}

// toolContent shows a result as the model reads it best: an image as an image,
// everything else as text.
func toolContent(op nucleus.Op, value json.RawMessage) []mcp.Content {
	var image struct {
		Image *struct {
			MIME string `json:"mime"`
			Data []byte `json:"data_b64"`
		} `json:"image"`
	}
	if json.Unmarshal(value, &image) == nil && image.Image != nil {
		return []mcp.Content{&mcp.ImageContent{MIMEType: image.Image.MIME, Data: image.Image.Data}}
	}
	return []mcp.Content{&mcp.TextContent{Text: strings.TrimSpace(tools.Text(op, value))}}
}
