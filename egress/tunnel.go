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

// tunnel carries bytes between the guest and p until both directions have
// ended, then ends p. from holds what was already read from guest.
func (p *passage) tunnel(guest net.Conn, from *bufio.Reader) {
	detach := context.AfterFunc(p.ctx, func() { guest.Close() })
	defer detach()
	defer guest.Close()

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
	if err != nil {
		p.cancel(err)
	} else {
		closeWrite(guest)
		// The far end has said all: the guest may finish, but not stay.
		linger := time.AfterFunc(p.g.limits.Handshake, func() { p.cancel(errFinished) })
		defer linger.Stop()
	}
	<-done
	p.end(nil)
}

// outward checks the first bytes and forwards them and all that follows.
func (p *passage) outward(guest net.Conn, from *bufio.Reader) error {
	if p.Port == httpsPort {
		guest.SetReadDeadline(time.Now().Add(p.g.limits.Handshake))
	}
	isTLS, err := looksLikeTLS(from)
	if errors.Is(err, io.EOF) {
		return nil
	}
	if err != nil {
		return err
	}
	if isTLS || p.Port == httpsPort {
		guest.SetReadDeadline(time.Now().Add(p.g.limits.Handshake))
		hello, err := readHello(from, p.Host)
		if err != nil {
			if errors.As(err, new(errHello)) {
				guest.SetWriteDeadline(time.Now().Add(time.Second))
				guest.Write(unrecognizedName)
			}
			return err
		}
		if _, err := p.conn.Write(hello); err != nil {
			return err
		}
	}
	guest.SetReadDeadline(time.Time{})
	_, err = io.CopyBuffer(onlyWriter{p.conn}, onlyReader{from}, make([]byte, copyBuffer))
	return err
}

// onlyReader and onlyWriter hide the short cuts of io.Copy, which would go
// around the meter.
type (
	onlyReader struct{ io.Reader }
	onlyWriter struct{ io.Writer }
)
