package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"slices"
	"sync"
	"time"

	"golang.org/x/term"

	"cal/node/client"
	"cal/nucleus"
	"cal/workspace"
)

// The screen of a session belongs to the agent, so what waits for the person is said in the
// terminal's title, which is the session's banner, with a bell; and where there is no
// terminal, in a line on standard error.

const askedEvery = time.Second

// sayWaiting says what waits for the person, until ctx ends.
func (s *session) sayWaiting(ctx context.Context, node *client.Client, screen *splice) {
	var known []string
	title := ""
	tick := time.NewTicker(askedEvery)
	defer tick.Stop()
	for {
		if asks, err := asksBelow(ctx, node, s.pod.ID); err == nil {
			fresh := slices.DeleteFunc(slices.Clone(asks), func(ask string) bool { return slices.Contains(known, ask) })
			known = asks
			if s.terminal && term.IsTerminal(2) {
				now := titleFor(s.pod, len(asks))
				if len(fresh) > 0 {
					now += "\x07"
				}
				if now != title {
					screen.Say(now)
				}
				title = titleFor(s.pod, len(asks))
			} else {
				for _, ask := range fresh {
					fmt.Fprintln(os.Stderr, "cal: an approval is wanted: cal approve", workspace.Shown(ask))
				}
			}
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

// asksBelow are the asks of a pod and of those below it.
func asksBelow(ctx context.Context, node *client.Client, root string) ([]string, error) {
	pods, err := node.Pods(ctx)
	if err != nil {
		return nil, err
	}
	tree, asks := map[string]bool{root: true}, []string{}
	for grown := true; grown; {
		grown = false
		for _, p := range pods {
			if !tree[p.ID] && tree[p.Parent] {
				tree[p.ID], grown = true, true
			}
		}
	}
	for _, p := range pods {
		if tree[p.ID] {
			asks = append(asks, p.Asks...)
		}
	}
	slices.Sort(asks)
	return asks, nil
}

// titleFor is what sets the terminal's title to the banner.
func titleFor(pod nucleus.PodStatus, asks int) string {
	line := workspace.Banner(pod)
	switch {
	case asks == 1:
		line = "1 APPROVAL WAITS: cal approve | " + line
	case asks > 1:
		line = fmt.Sprintf("%d APPROVALS WAIT: cal approve | %s", asks, line)
	}
	return "\x1b]0;" + line + "\x07"
}

// splice is the way of an agent's output to the terminal, into which something can be said
// between two of its characters and sequences (ECMA-48), never within one. An agent that ends
// none hears nothing said: the title is a hint, and cal approve does not need it.
type splice struct {
	out io.Writer

	mu    sync.Mutex
	in    place
	more  int // bytes of a character that are still to come
	later string
}

// place is where in what it sends an agent stands.
type place int

const (
	ground   place = iota // between two
	letter                // in a character of several bytes
	escape                // behind ESC
	control               // in a control sequence
	text                  // in a string, which BEL or ST ends
	textLast              // in a string, behind ESC
)

// Write passes on what the agent's screen is made of.
func (s *splice) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, c := range p {
		s.next(c)
	}
	n, err := s.out.Write(p)
	if err == nil {
		err = s.speak()
	}
	return n, err
}

// Say writes what is said last as soon as it may.
func (s *splice) Say(text string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.later = text
	_ = s.speak() // a terminal that is gone ends the session by itself
}

func (s *splice) speak() error {
	if s.later == "" || s.in != ground {
		return nil
	}
	_, err := io.WriteString(s.out, s.later)
	s.later = ""
	return err
}

// next follows one byte.
func (s *splice) next(c byte) {
	if s.in == letter {
		if c&0xc0 == 0x80 {
			if s.more--; s.more == 0 {
				s.in = ground
			}
			return
		}
		s.in = ground // it was broken off
	}
	switch {
	case c == 0x18 || c == 0x1a: // CAN and SUB end every sequence
		s.in = ground
	case s.in == text && c == 0x1b:
		s.in = textLast
	case s.in == text && c == 0x07, s.in == textLast && c == '\\':
		s.in = ground
	case s.in == text:
	case c == 0x1b:
		s.in = escape
	case s.in == escape || s.in == textLast: // ESC ends a string, and begins something else
		s.behindEscape(c)
	case s.in == control:
		if c >= 0x40 && c <= 0x7e {
			s.in = ground
		}
	case c >= 0xc0: // UTF-8
		s.in, s.more = letter, 1
		if c >= 0xe0 {
			s.more = 2
		}
		if c >= 0xf0 {
			s.more = 3
		}
	}
}

func (s *splice) behindEscape(c byte) {
	switch {
	case c == '[':
		s.in = control
	case c == ']' || c == 'P' || c == 'X' || c == '^' || c == '_':
		s.in = text
	case c >= 0x20 && c <= 0x2f: // intermediate
		s.in = escape
	default:
		s.in = ground
	}
}
