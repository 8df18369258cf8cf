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

// Clock is the wall clock of a node, apart from that of everybody else.
type Clock struct {
	t    *testing.T
	file string
}

// Ahead sets how far the clock is ahead of the real one.
func (c Clock) Ahead(d time.Duration) {
	c.t.Helper()
	temporary := c.file + ".new"
	if err := os.WriteFile(temporary, []byte(strconv.FormatInt(int64(d), 10)), 0o600); err != nil {
		c.t.Fatal(err)
	}
	if err := os.Rename(temporary, c.file); err != nil {
		c.t.Fatal(err)
	}
}

// ClockedNode starts the node: the product's own, as nucleus-node puts it together, but for
// a wall clock that the test sets. The test's package calls Main.
func (e *Env) ClockedNode() (*Running, Clock) {
	e.t.Helper()
	clock := Clock{e.t, filepath.Join(e.Dir, "clock")}
	clock.Ahead(0)
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
	n, err := node.Open(ctx, node.Config{
		Home:    home,
		Drivers: []machine.Driver{gvisor.New(gvisor.Config{Runsc: filepath.Join(bin, "runsc")})},
		Proxy:   filepath.Join(bin, "nucleus-tool-proxy"),
		Stop:    stop,
		Now:     func() time.Time { return time.Now().Add(ahead(filepath.Join(filepath.Dir(home), "clock"))) },
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
