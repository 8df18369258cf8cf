// Command steady is the demo's agent with the patience that real agents have: a
// request to its model that fails is made again. The model's script makes up for
// tool calls that fail.
package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"os"
	"time"

	"cal/internal/demoagent"
)

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "steady:", err)
		os.Exit(1)
	}
}

func run() error {
	model, err := url.Parse(os.Getenv("ANTHROPIC_BASE_URL"))
	if err != nil {
		return err
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	go http.Serve(l, &httputil.ReverseProxy{Rewrite: func(r *httputil.ProxyRequest) { r.SetURL(model) }, Transport: patient{}})
	return demoagent.Agent{
		ModelURL: "http://" + l.Addr().String(), Model: "steady", Key: os.Getenv("ANTHROPIC_API_KEY"),
		MCPURL: os.Getenv("CAL_MCP_URL"), Prompt: os.Args[1], Out: os.Stdout,
	}.Run(context.Background())
}

// patient makes a request again until an answer has come whole.
type patient struct{}

const patience = 2 * time.Minute

func (patient) RoundTrip(r *http.Request) (*http.Response, error) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return nil, err
	}
	deadline := time.Now().Add(patience)
	for {
		resp, err := once(r, body)
		if err == nil || time.Now().After(deadline) {
			return resp, err
		}
		time.Sleep(50 * time.Millisecond)
	}
}

func once(r *http.Request, body []byte) (*http.Response, error) {
	again := r.Clone(r.Context())
	again.Body = io.NopCloser(bytes.NewReader(body))
	resp, err := http.DefaultTransport.RoundTrip(again)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	whole, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("model: %s: %s", resp.Status, whole)
	}
	resp.Body = io.NopCloser(bytes.NewReader(whole))
	return resp, err
}
