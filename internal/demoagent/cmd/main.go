// Command demoagent runs the demo's agent. Its places come from the environment,
// as every agent's do: ANTHROPIC_BASE_URL, ANTHROPIC_API_KEY, CAL_MCP_URL. Its
// arguments are the prompt.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"cal/internal/demoagent"
)

func main() {
	agent := demoagent.Agent{
		ModelURL: os.Getenv("ANTHROPIC_BASE_URL"),
		Model:    "demo",
		Key:      os.Getenv("ANTHROPIC_API_KEY"),
		MCPURL:   os.Getenv("CAL_MCP_URL"),
		Prompt:   strings.Join(os.Args[1:], " "),
		Out:      os.Stdout,
	}
	if agent.ModelURL == "" || agent.MCPURL == "" || agent.Prompt == "" {
		fmt.Fprintln(os.Stderr, "usage: ANTHROPIC_BASE_URL=URL CAL_MCP_URL=URL demoagent PROMPT")
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := agent.Run(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "demoagent:", err)
		if ctx.Err() != nil {
			os.Exit(130)
		}
		os.Exit(1)
	}
}
