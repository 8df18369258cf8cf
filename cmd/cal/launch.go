package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"golang.org/x/term"

	approvals "cal/approval/client"
	"cal/node/client"
	"cal/nucleus"
	"cal/workspace"
)

// openNode returns the person's node. One of another version is restarted when the person says
// so; where nobody can be asked it is an error that names the command.
func openNode(ctx context.Context, home workspace.Home, ask bool) (*client.Client, error) {
	node, err := home.Node(ctx)
	var other *workspace.OtherVersion
	if !ask || !errors.As(err, &other) {
		return node, err
	}
	fmt.Fprintln(os.Stderr, "cal:", other.Fact())
	if err := question(ctx, "Enter restarts the node, q quits: "); err != nil {
		return nil, err
	}
	return home.RestartNode(ctx)
}

// confirm says what is about to be launched. Before an agent starts it shows the whole of it and,
// where there is somebody to ask, waits for Enter. It returns what it told of approvers.
func confirm(ctx context.Context, home workspace.Home, node *client.Client, plan *workspace.Plan, ask bool) (told []string, err error) {
	for _, line := range plan.Notes {
		fmt.Fprintln(os.Stderr, "cal:", workspace.Shown(line))
	}
	if plan.Spec.Agent == nil {
		if handed := plan.HandedOver(); handed != "" {
			fmt.Fprintln(os.Stderr, "cal: handed over:", handed)
		}
		return nil, nil
	}
	pod, err := planPod(ctx, node, plan.Spec)
	if err != nil {
		return nil, err
	}
	by := pod.Approvals
	if by != approvals.Passkey {
		by = home.Approvals(ctx) // which says what to do where there is nobody
	}
	fmt.Fprint(os.Stderr, plan.Confirmation(pod, by))
	sayUnconfirmed(pod.Unconfirmed)
	if !ask {
		return pod.Unconfirmed, nil
	}
	return pod.Unconfirmed, question(ctx, "Enter launches, q quits: ")
}

// planPod asks the node what it would make of spec. Where that takes a while the person is told why.
func planPod(ctx context.Context, node *client.Client, spec nucleus.PodSpec) (nucleus.PodStatus, error) {
	slow := time.AfterFunc(planPatience, func() {
		progress("the node tries which machines this host can run; the first microVM waits for a kernel to be fetched")
	})
	defer slow.Stop()
	return node.PlanPod(ctx, spec)
}

const planPatience = 2 * time.Second

// sayUnconfirmed tells of approvers whose keys the person has not confirmed.
func sayUnconfirmed(lines []string) {
	for _, line := range lines {
		fmt.Fprintln(os.Stderr, "cal:", workspace.Shown(line))
	}
	if len(lines) > 0 {
		fmt.Fprintln(os.Stderr, "cal: who has these keys can approve for this machine. If it was not you who made them, somebody took the authority's place; cal approve trust confirms them")
	}
}

// question asks until the person answers with Enter, which is nil, or with q, the end of the
// input or an interrupt.
func question(ctx context.Context, text string) error {
	for {
		fmt.Fprint(os.Stderr, text)
		answer := make(chan string, 1)
		go func() { answer <- readLine(os.Stdin) }() // a read from a terminal cannot be called off; it ends with the process
		select {
		case <-ctx.Done():
			fmt.Fprintln(os.Stderr)
			return ctx.Err()
		case line := <-answer:
			switch strings.ToLower(strings.TrimSpace(line)) {
			case "":
				if strings.HasSuffix(line, "\n") {
					return nil
				}
				fmt.Fprintln(os.Stderr) // the input has ended
				return exitCode(exitInterrupted)
			case "q", "quit", "n", "no":
				return exitCode(exitInterrupted)
			}
		}
	}
}

// readLine reads a line and nothing behind it, which is the agent's.
func readLine(r io.Reader) string {
	var line []byte
	one := make([]byte, 1)
	for len(line) < 1024 {
		n, err := r.Read(one)
		if n == 1 {
			line = append(line, one[0])
		}
		if err != nil || n == 1 && one[0] == '\n' {
			break
		}
	}
	return string(line)
}

// createPod starts a machine. One whose start was called off is gone when createPod returns, also
// where the answer was on its way already.
func createPod(ctx context.Context, node *client.Client, spec nucleus.PodSpec) (nucleus.PodStatus, error) {
	spec.Ref = nucleus.NewID("r-")
	pod, err := node.CreatePod(ctx, spec)
	if ctx.Err() == nil {
		return pod, err
	}
	ending, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
	defer cancel()
	if err := node.DeletePod(ending, spec.Ref); err != nil && nucleus.AsError(err).Kind != nucleus.KindNotFound {
		return pod, err
	}
	return pod, ctx.Err()
}

// starting says that a machine is being made. What it returns says what came of that, in its place.
func starting(workspaceName string) (failed func()) {
	if !term.IsTerminal(2) {
		return func() {} // the error says it
	}
	line := workspace.Shown("\U0001F512 CAL ISOLATION STARTING | " + workspaceName)
	fmt.Fprintf(os.Stderr, "\x1b]0;%s\x07%s", line, coloured(yellow, line))
	return func() {
		line := workspace.Shown("CAL ISOLATION FAILED | " + workspaceName)
		fmt.Fprintf(os.Stderr, "\r\x1b[K%s\n", coloured(red, line))
	}
}

// banner says in the terminal and in its title what the agent runs in, in the place of what
// starting said.
func banner(pod nucleus.PodStatus) {
	line := workspace.Banner(pod)
	if !term.IsTerminal(2) {
		fmt.Fprintln(os.Stderr, line)
		return
	}
	fmt.Fprintf(os.Stderr, "\x1b]0;%s\x07\r\x1b[K%s\n", line, coloured(green, line))
}

// keepTitle has the terminal remember its title until restore.
func keepTitle() (restore func()) {
	if !term.IsTerminal(2) {
		return func() {}
	}
	fmt.Fprint(os.Stderr, "\x1b[22;0t")
	return func() { fmt.Fprint(os.Stderr, "\x1b[23;0t") }
}

// The colours of a session's state, which its words say too.
const (
	green  = "1;32" // running
	yellow = "1;33" // starting
	red    = "1;31" // failed
)

func coloured(colour, text string) string {
	if os.Getenv("NO_COLOR") != "" {
		return text
	}
	return "\x1b[" + colour + "m" + text + "\x1b[0m"
}
