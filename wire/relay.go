package wire

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync/atomic"
	"time"
)

// Relay copies bytes both ways between a and b, closes both and returns how many
// went each way. It ends when both directions have ended, when one of them fails,
// when ctx ends, or when for the time idle nothing went either way (0: no such
// limit). It leaves no goroutine behind.
//
// The end of one direction is passed on as such where the receiver can be closed
// for writing only: a TCP or unix socket, TLS, a stream of a session. Then the
// other direction goes on; on a stream for ten minutes, after which it fails. On
// other connections the first end ends both. The error is nil when all bytes that
// were read have been written.
func Relay(ctx context.Context, a, b net.Conn, idle time.Duration) (aToB, bToA int64, err error) {
	defer a.Close()
	defer b.Close()
	start := time.Now()
	var last atomic.Int64 // when a byte last moved, since start
	touch := func() { last.Store(int64(time.Since(start))) }
	there, back := &direction{from: a, to: b, touch: touch}, &direction{from: b, to: a, touch: touch}
	ended := make(chan *direction, 2)
	for _, d := range []*direction{there, back} {
		go func() {
			d.run()
			ended <- d
		}()
	}

	var quiet <-chan time.Time
	timer := &time.Timer{}
	if idle > 0 {
		timer = time.NewTimer(idle)
		defer timer.Stop()
		quiet = timer.C
	}
	stopped := false
	stop := func(why error) {
		if !stopped {
			stopped, err = true, why // what follows is its consequence
		}
		a.Close()
		b.Close()
	}
	for running := 2; running > 0; {
		select {
		case d := <-ended:
			running--
			if d.err != nil || d.final {
				stop(d.err)
			}
		case <-ctx.Done():
			stop(context.Cause(ctx))
			ctx = context.Background()
		case <-quiet:
			left := idle - (time.Since(start) - time.Duration(last.Load()))
			if left <= 0 {
				stop(fmt.Errorf("wire: nothing relayed for %v: %w", idle, os.ErrDeadlineExceeded))
				quiet = nil
				continue
			}
			timer.Reset(left)
		}
	}
	return there.bytes, back.bytes, err
}

// direction is one half of a relay. Its results are read after it has ended.
type direction struct {
	from, to net.Conn
	touch    func()
	bytes    int64
	err      error
	final    bool // its end cannot be passed on alone
}

func (d *direction) run() {
	buf := make([]byte, chunk)
	for {
		n, err := d.from.Read(buf)
		if n > 0 {
			d.touch()
			written, err := d.to.Write(buf[:n])
			d.bytes += int64(written)
			if err != nil {
				d.err = err
				return
			}
			d.touch()
		}
		if errors.Is(err, io.EOF) {
			d.final = !endWriting(d.to)
			return
		}
		if err != nil {
			d.err = err
			return
		}
	}
}

// endWriting reports whether it could tell the other end of conn, and nobody
// else, that no more will come.
func endWriting(conn net.Conn) bool {
	half, ok := conn.(interface{ CloseWrite() error })
	return ok && half.CloseWrite() == nil
}
