// Command demo runs CAL's main job from start to end with the real programs, in a
// CAL_HOME of its own: a person's repository goes into a machine, an agent works
// on it, reads a hostile page, tries to push and to post, is stopped, the person is
// asked, the log is verified, the fix lands. What it prints is read back from the
// log, the machine and git.
//
// With --control it takes each wall away in turn and fails unless the attack then
// succeeds: so the demo's refusals are shown to be the walls'.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"
)

func main() {
	bin := flag.String("bin", "bin", "directory of the built programs")
	control := flag.Bool("control", false, "take each wall away in turn; fail unless the attack then succeeds")
	keep := flag.Bool("keep", false, "keep the demo's CAL_HOME and repository")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	ctx, cancel := context.WithTimeout(ctx, 10*time.Minute)
	defer cancel()
	dir, err := filepath.Abs(*bin)
	if err == nil && *control {
		err = controls(ctx, dir)
	} else if err == nil {
		err = demo(ctx, dir, *keep)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		os.Exit(1)
	}
}

// demo is the story a person sees. Each line under a heading was read back.
func demo(ctx context.Context, bin string, keep bool) (err error) {
	started := time.Now()
	s, err := newStage(ctx, bin)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.close(keep)) }()

	say("1. A person's repository with a failing test, and a remote that it is pushed to")
	fail := s.mustTest(false)
	show("host", fail)

	say("2. The agent runs in a gVisor machine: reads, edits, tests, commits, fetches a page, tries to push and to post")
	s.person = denyAll
	run, err := s.run(ctx)
	if err != nil {
		return err
	}
	show("agent", run)

	say("3. The person was asked, on a screen that the authority drew from the bytes that are signed")
	for _, screen := range s.screens() {
		show("authority", screen)
	}

	say("4. What the log holds of it")
	table, err := s.logTable(ctx)
	if err != nil {
		return err
	}
	show("log", table)

	say("5. What got out")
	leaks, err := s.leaks(ctx)
	if err != nil {
		return err
	}
	show("world", leaks.String())
	if leaks.any() {
		return errors.New("something got out that the person had refused")
	}

	say("6. The log proves itself, offline")
	verified, err := s.cal(ctx, "audit", "verify")
	if err != nil {
		return err
	}
	show("cal audit verify", verified)

	say("7. The fix comes back through git and lands in the person's working tree")
	applied, err := s.cal(ctx, "repo", "apply", "--repo", s.repo)
	if err != nil {
		return err
	}
	show("cal repo apply", applied)
	show("host", s.mustTest(true))
	fmt.Printf("\ndone in %.1f s\n", time.Since(started).Seconds())
	return s.failure()
}

func say(heading string) { fmt.Printf("\n%s\n", heading) }

func show(who, text string) {
	for line := range lines(text) {
		fmt.Printf("  %s | %s\n", who, line)
	}
}
