package testenv

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"cal/machine"
	"cal/machine/gvisor"
	"cal/node"
)

// Main is the TestMain of a package whose tests use ClockedNode.
func Main(m *testing.M) {
	if len(os.Args) == 4 && os.Args[1] == clockedNode {
		if err := runClockedNode(os.Args[2], os.Args[3]); err != nil {
			fmt.Fprintln(os.Stderr, "clocked node:", err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

const clockedNode = "clocked-node"

// Clock is the clocks of a node, apart from those of everybody else.
type Clock struct {
	t   *testing.T
	dir string
}

// The files in which it stands how far a clock is ahead.
const (
	wallFile      = "clock"
	monotonicFile = "monotonic"
)

// Ahead sets how far the wall clock is ahead of the real one.
func (c Clock) Ahead(d time.Duration) { c.t.Helper(); c.set(wallFile, d) }

// Passed sets how far the monotonic clock is ahead: how much time has passed beside the real one.
func (c Clock) Passed(d time.Duration) { c.t.Helper(); c.set(monotonicFile, d) }

func (c Clock) set(name string, d time.Duration) {
	c.t.Helper()
	file := filepath.Join(c.dir, name)
	temporary := file + ".new"
	if err := os.WriteFile(temporary, []byte(strconv.FormatInt(int64(d), 10)), 0o600); err != nil {
		c.t.Fatal(err)
	}
	if err := os.Rename(temporary, file); err != nil {
		c.t.Fatal(err)
	}
}

// ClockedNode starts the node: the product's own, as nucleus-node puts it together, but for
// clocks that the test sets. The test's package calls Main.
func (e *Env) ClockedNode() (*Running, Clock) {
	e.t.Helper()
	clock := Clock{e.t, e.Dir}
	clock.Ahead(0)
	clock.Passed(0)
	self, err := os.Executable()
	if err != nil {
		e.t.Fatal(err)
	}
	cmd := exec.Command(self, clockedNode, e.CAL, e.Bin)
	cmd.Env = e.Command("cal").Env
	cmd.Dir = e.Home
	running := e.Start(cmd)
	Eventually(e.t, 20*time.Second, "the clocked node serves", func() bool {
		_, err := e.NodePID()
		return err == nil
	})
	return running, clock
}

func runClockedNode(home, bin string) error {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	started, dir := time.Now(), filepath.Dir(home)
	n, err := node.Open(ctx, node.Config{
		Home:    home,
		Drivers: []machine.Driver{gvisor.New(gvisor.Config{Runsc: filepath.Join(bin, "runsc")})},
		Proxy:   filepath.Join(bin, "nucleus-tool-proxy"),
		Stop:    stop,
		Now:     func() time.Time { return time.Now().Add(ahead(filepath.Join(dir, wallFile))) },

		Monotonic: func() time.Duration { return time.Since(started) + ahead(filepath.Join(dir, monotonicFile)) },
	})
	if err != nil {
		return err
	}
	return errors.Join(n.Serve(ctx), n.Close())
}

func ahead(file string) time.Duration {
	raw, err := os.ReadFile(file)
	if err != nil {
		panic(err) // a test's own file: better none than a wrong clock
	}
	d, err := strconv.ParseInt(strings.TrimSpace(string(raw)), 10, 64)
	if err != nil {
		panic(err)
	}
	return time.Duration(d)
}
