package wire

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"io"
	"net"
	"os"
	"os/exec"
	"strconv"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/yamux"
)

func init() {
	helpers["echo"] = echoHelper
	helpers["a day"] = func() {
		testing.Init()
		testing.Main(func(_, _ string) (bool, error) { return true, nil }, []testing.InternalTest{{Name: "a day", F: oneDay}}, nil, nil)
	}
}

// TestNoTimerEndsASession looks at every timer that yamux has. One that is added
// by a later version shows as a field that is not accounted for.
func TestNoTimerEndsASession(t *testing.T) {
	got := *muxConfig(defaultLimits)
	if got.EnableKeepAlive || got.StreamOpenTimeout != 0 || got.ConnectionWriteTimeout < 30*24*time.Hour {
		t.Errorf("a timer ends sessions: %+v", got)
	}
	if got.StreamCloseTimeout != defaultLimits.linger || got.StreamCloseTimeout <= 0 {
		t.Errorf("streams that the other end never closes are kept for %v", got.StreamCloseTimeout)
	}
	want := yamux.Config{
		AcceptBacklog: defaultLimits.backlog, KeepAliveInterval: 30 * time.Second, ConnectionWriteTimeout: got.ConnectionWriteTimeout,
		MaxStreamWindowSize: streamWindow, StreamCloseTimeout: defaultLimits.linger, LogOutput: io.Discard,
	}
	if got != want {
		t.Errorf("got %+v, want %+v", got, want)
	}
}

// echoHelper is the other end in a process of its own: it answers each stream with
// the digest of what it read. Two connections: one with our session, one with
// plain yamux for the control.
func echoHelper() {
	guest, err := Guest(inherited(3))
	if err != nil {
		panic(err)
	}
	config := yamux.DefaultConfig()
	config.LogOutput = io.Discard
	if _, err := yamux.Server(inherited(4), config); err != nil {
		panic(err)
	}
	for {
		stream, err := guest.Accept()
		if err != nil {
			return
		}
		go func() {
			defer stream.Close()
			sum := sha256.New()
			for {
				kind, payload, err := stream.Recv(1 << 20)
				if err != nil {
					return
				}
				sum.Write(payload)
				if kind == FrameResult {
					stream.Send(FrameResult, sum.Sum(nil))
					return
				}
			}
		}()
	}
}

func inherited(fd uintptr) net.Conn {
	conn, err := net.FileConn(os.NewFile(fd, strconv.Itoa(int(fd))))
	if err != nil {
		panic(err)
	}
	return conn
}

// TestPeerStopped: the other end is a process that is stopped with SIGSTOP while
// writes are pending, until a control with yamux's own timers, shortened a
// hundredfold, has died of each. What was pending arrives when it goes on.
func TestPeerStopped(t *testing.T) {
	a, peerA := socketPair(t)
	b, peerB := socketPair(t)
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), "WIRE_TEST_HELPER=echo")
	cmd.Stderr = os.Stderr
	for _, conn := range []net.Conn{peerA, peerB} {
		file, err := conn.(*net.UnixConn).File()
		if err != nil {
			t.Fatal(err)
		}
		defer file.Close()
		cmd.ExtraFiles = append(cmd.ExtraFiles, file)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		cmd.Process.Kill()
		cmd.Wait()
	}()
	peerA.Close()
	peerB.Close()

	host, err := Host(a)
	if err != nil {
		t.Fatal(err)
	}
	defer host.Close()
	call := func(ctx context.Context, size int) error {
		stream, err := host.Open(ctx, "call", nil)
		if err != nil {
			return err
		}
		defer stream.Close()
		if until, ok := ctx.Deadline(); ok {
			stream.SetDeadline(until)
		}
		sum := sha256.New()
		piece := bytes.Repeat([]byte("x"), 64<<10)
		for ; size > 0; size -= len(piece) {
			sum.Write(piece)
			if err := stream.Send(FrameData, piece); err != nil {
				return err
			}
		}
		if err := stream.Send(FrameResult, nil); err != nil {
			return err
		}
		_, got, err := stream.Recv(100)
		if err == nil && !bytes.Equal(got, sum.Sum(nil)) {
			err = errors.New("another digest")
		}
		return err
	}
	if err := call(timeout(t, patience), 1<<20); err != nil {
		t.Fatalf("before: %v", err)
	}

	if err := cmd.Process.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	stopped := time.Now()
	config := yamux.DefaultConfig()
	config.KeepAliveInterval, config.ConnectionWriteTimeout, config.StreamOpenTimeout = 300*time.Millisecond, 100*time.Millisecond, 750*time.Millisecond
	config.LogOutput = io.Discard
	control, err := yamux.Client(b, config)
	if err != nil {
		t.Fatal(err)
	}
	defer control.Close()

	// Pending: large calls that wait without a deadline, and calls that give up.
	var pending sync.WaitGroup
	for range 4 {
		pending.Go(func() {
			if err := call(t.Context(), 2<<20); err != nil {
				t.Errorf("a call that waited: %v", err)
			}
		})
	}
	gaveUp := 0
	for range 50 {
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Millisecond)
		if err := call(ctx, 1<<20); errors.Is(err, os.ErrDeadlineExceeded) || errors.Is(err, context.DeadlineExceeded) {
			gaveUp++
		} else {
			t.Errorf("a call to a stopped end: %v", err)
		}
		cancel()
	}
	select {
	case <-control.CloseChan():
		t.Logf("the control died after %v", time.Since(stopped))
	case <-time.After(patience):
		t.Error("the control survives: the stop proves nothing")
	}
	<-time.After(time.Until(stopped.Add(2 * time.Second))) // some seconds, as promised
	if err := host.Err(); err != nil {
		t.Fatalf("while the other end was stopped: %v", err)
	}

	if err := cmd.Process.Signal(syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	within(t, "pending calls", patience, pending.Wait)
	if err := call(timeout(t, patience), 1<<20); err != nil {
		t.Errorf("after: %v", err)
	}
	eventually(t, "all streams have ended", func() bool { return len(host.outgoing) == 0 })
	if err := host.Err(); err != nil {
		t.Errorf("after: %v", err)
	}
}

// TestADay runs oneDay in a process of its own, since yamux keeps timers in a pool
// that tests inside and outside of a bubble must not share.
func TestADay(t *testing.T) {
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), "WIRE_TEST_HELPER=a day")
	if out, err := cmd.CombinedOutput(); err != nil || !bytes.Contains(out, []byte("PASS")) {
		t.Errorf("%v\n%s", err, out)
	}
}

// oneDay lets a day go by, on a clock of its own, while the connection is frozen
// and while it only idles. The control, with yamux's defaults, dies.
func oneDay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b, freeze := freezer()
		host, err := Host(a)
		if err != nil {
			t.Fatal(err)
		}
		defer host.Close()
		guest, err := Guest(b)
		if err != nil {
			t.Fatal(err)
		}
		defer guest.Close()
		defer freeze(false)

		p, q, freezeControl := freezer()
		config := yamux.DefaultConfig()
		config.LogOutput = io.Discard
		control, err := yamux.Client(p, config)
		if err != nil {
			t.Fatal(err)
		}
		defer control.Close()
		controlPeer, err := yamux.Server(q, config)
		if err != nil {
			t.Fatal(err)
		}
		defer controlPeer.Close()
		defer freezeControl(false)

		x, err := host.Open(t.Context(), "test", nil)
		if err != nil {
			t.Fatal(err)
		}
		defer x.Close()
		y, err := guest.Accept()
		if err != nil {
			t.Fatal(err)
		}
		defer y.Close()
		pingPong := func(when string) {
			x.SetDeadline(time.Now().Add(time.Minute))
			y.SetDeadline(time.Now().Add(time.Minute))
			if err := x.Send(FrameJSON, []byte(when)); err != nil {
				t.Fatalf("%s: %v", when, err)
			}
			if _, got, err := y.Recv(100); err != nil || string(got) != when {
				t.Fatalf("%s: %q, %v", when, got, err)
			}
			if err := y.Send(FrameJSON, []byte(when)); err != nil {
				t.Fatalf("%s: %v", when, err)
			}
			if _, _, err := x.Recv(100); err != nil {
				t.Fatalf("%s: %v", when, err)
			}
		}
		pingPong("at first")
		time.Sleep(24 * time.Hour) // the bubble's clock: at once
		pingPong("after a day of rest")
		if control.IsClosed() {
			t.Fatal("the control died of rest alone")
		}

		freeze(true)
		freezeControl(true)
		x.SetDeadline(time.Time{})
		sent := make(chan error, 1)
		go func() { sent <- x.Send(FrameJSON, make([]byte, 4*streamWindow)) }()
		time.Sleep(24 * time.Hour)
		select {
		case err := <-sent:
			t.Fatalf("a write through a frozen connection: %v", err)
		default:
		}
		if !control.IsClosed() {
			t.Fatal("the control survives: the freeze proves nothing")
		}
		freeze(false)
		y.SetDeadline(time.Now().Add(time.Minute))
		if _, got, err := y.Recv(1 << 30); err != nil || len(got) != 4*streamWindow {
			t.Fatalf("after a day in the ice: %d bytes, %v", len(got), err)
		}
		if err := <-sent; err != nil {
			t.Fatal(err)
		}
		pingPong("after a day in the ice")
	})
}

// freezer returns a connection whose bytes stand still while it is frozen.
func freezer() (a, b net.Conn, freeze func(bool)) {
	p, q := net.Pipe()
	ice := &ice{thawed: make(chan struct{})}
	close(ice.thawed)
	return &frozenConn{Conn: p, ice: ice, closed: make(chan struct{})}, &frozenConn{Conn: q, ice: ice, closed: make(chan struct{})}, ice.freeze
}

type ice struct {
	mu     sync.Mutex
	frozen bool
	thawed chan struct{}
}

func (i *ice) freeze(on bool) {
	i.mu.Lock()
	defer i.mu.Unlock()
	if on && !i.frozen {
		i.thawed = make(chan struct{})
	}
	if !on && i.frozen {
		close(i.thawed)
	}
	i.frozen = on
}

type frozenConn struct {
	net.Conn
	ice    *ice
	once   sync.Once
	closed chan struct{}
}

func (c *frozenConn) Write(p []byte) (int, error) {
	c.ice.mu.Lock()
	thawed := c.ice.thawed
	c.ice.mu.Unlock()
	select {
	case <-thawed:
	case <-c.closed:
	}
	return c.Conn.Write(p)
}

func (c *frozenConn) Close() error {
	c.once.Do(func() { close(c.closed) })
	return c.Conn.Close()
}
