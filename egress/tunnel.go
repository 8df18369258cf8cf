package egress

import (
	"bufio"
	"context"
	"errors"
	"io"
	"net"
	"time"
)

// httpsPort is the port on which a client must begin with a ClientHello;
// elsewhere one is checked where it comes.
const httpsPort = 443

const copyBuffer = 32 << 10

// past is a deadline that has gone by.
var past = time.Unix(1, 0)

// tunnel carries bytes between the guest and p until both directions have
// ended, then closes guest and ends p. from holds what was already read from
// guest. Whatever ends p early ends the reads and writes on guest by their
// deadline; it is closed when nobody uses it any more.
func (p *crossing) tunnel(guest net.Conn, from *bufio.Reader) {
	defer guest.Close()
	detach := context.AfterFunc(p.ctx, func() { guest.SetDeadline(past) })
	defer detach()

	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := p.outward(guest, from); err != nil {
			p.cancel(err)
		} else {
			closeWrite(p.conn.Conn)
		}
	}()
	_, err := io.CopyBuffer(onlyWriter{guest}, onlyReader{p.conn}, make([]byte, copyBuffer))
	switch {
	case err != nil:
		p.cancel(err)
	case closeWrite(guest):
		// The far end has said all: the guest may finish, but not stay.
		linger := time.AfterFunc(p.g.limits.Handshake, func() { p.cancel(errFinished) })
		defer linger.Stop()
	default:
		p.cancel(errFinished)
	}
	<-done
	p.end(nil)
}

// outward checks the first bytes and forwards them and all that follows.
func (p *crossing) outward(guest net.Conn, from *bufio.Reader) error {
	if p.Port == httpsPort {
		if err := p.readUntil(guest, time.Now().Add(p.g.limits.Handshake)); err != nil {
			return err
		}
	}
	isTLS, err := looksLikeTLS(from)
	if errors.Is(err, io.EOF) {
		return nil
	}
	if err != nil {
		return err
	}
	if isTLS || p.Port == httpsPort {
		if err := p.forwardHello(guest, from); err != nil {
			return err
		}
	}
	_, err = io.CopyBuffer(onlyWriter{p.conn}, onlyReader{from}, make([]byte, copyBuffer))
	return err
}

func (p *crossing) forwardHello(guest net.Conn, from io.Reader) error {
	if err := p.readUntil(guest, time.Now().Add(p.g.limits.Handshake)); err != nil {
		return err
	}
	hello, err := readHello(from, p.Host)
	if err != nil {
		if errors.As(err, new(errHello)) {
			guest.SetWriteDeadline(time.Now().Add(time.Second))
			_, _ = guest.Write(unrecognizedName)
		}
		return err
	}
	if _, err := p.conn.Write(hello); err != nil {
		return err
	}
	return p.readUntil(guest, time.Time{})
}

// readUntil sets a deadline without undoing the one that ends p.
func (p *crossing) readUntil(guest net.Conn, deadline time.Time) error {
	guest.SetReadDeadline(deadline)
	return context.Cause(p.ctx)
}

// onlyReader and onlyWriter hide the short cuts of io.Copy, which would go
// around the meter.
type (
	onlyReader struct{ io.Reader }
	onlyWriter struct{ io.Writer }
)
