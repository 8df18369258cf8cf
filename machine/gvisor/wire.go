package gvisor

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"sync"

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

// bounded keeps the first few kilobytes of what is written.
type bounded struct {
	mu   sync.Mutex
	text strings.Builder
}

func (b *bounded) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if room := consoleTail - b.text.Len(); room > 0 {
		b.text.Write(p[:min(room, len(p))])
	}
	return len(p), nil
}

func (b *bounded) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.text.String()
}

// tail returns the end of a file, "" where there is none.
func tail(name string) string {
	file, err := os.Open(name)
	if err != nil {
		return ""
	}
	defer file.Close()
	info, err := file.Stat()
	if err != nil {
		return ""
	}
	from := max(0, info.Size()-consoleTail)
	data, err := io.ReadAll(io.NewSectionReader(file, from, consoleTail))
	if err != nil {
		return ""
	}
	return string(data)
}

// shorten empties a console that has grown large, but for its end. The guest
// writes at the end of whatever is there.
func shorten(name string) {
	info, err := os.Stat(name)
	if err != nil || info.Size() <= consoleMost {
		return
	}
	end := tail(name)
	file, err := os.OpenFile(name, os.O_WRONLY|os.O_APPEND|os.O_TRUNC, 0)
	if err != nil {
		return
	}
	defer file.Close()
	_, _ = io.WriteString(file, end) // lost on a full disk; the console is a help, not a record
}

func lastLine(text string) string {
	lines := strings.Split(strings.TrimSpace(text), "\n")
	return lines[len(lines)-1]
}
