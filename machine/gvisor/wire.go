package gvisor

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"

	"golang.org/x/sys/unix"
)

// socketPair returns both ends of a new wire. Neither is inherited by accident:
// a child that kept one would keep the wire open.
func socketPair() (host net.Conn, guest *os.File, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("wire: %w", err)
	}
	guest = os.NewFile(uintptr(fds[1]), "wire of the machine")
	end := os.NewFile(uintptr(fds[0]), "wire of the host")
	defer end.Close() // FileConn has taken a copy
	host, err = net.FileConn(end)
	if err != nil {
		guest.Close()
		return nil, nil, fmt.Errorf("wire: %w", err)
	}
	return host, guest, nil
}

// handedWire is the host's end of a wire that is being handed in. Where the
// proxy refused it, reading ends with the reason instead of io.EOF.
type handedWire struct {
	net.Conn
	answered chan struct{} // closed when the hand-over is over
	refusal  error
}

func (w *handedWire) Read(p []byte) (int, error) {
	n, err := w.Conn.Read(p)
	if err == io.EOF || errors.Is(err, unix.ECONNRESET) {
		<-w.answered
		if w.refusal != nil {
			return n, w.refusal
		}
	}
	return n, err
}
