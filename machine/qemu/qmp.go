package qemu

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"
)

// monitor is QEMU's control socket. Who took over QEMU answers on it what he likes: an
// answer is bounded, has a deadline, and nothing but its being there is believed.
type monitor struct {
	conn    net.Conn
	answers chan answer // to the command that waits
	gone    chan struct{}

	mu   sync.Mutex // one command at a time
	last sync.Mutex // of ended
	why  string     // the guest ended the machine, QEMU says
}

// answer is one line of QEMU's that is no event.
type answer struct {
	Return json.RawMessage `json:"return"`
	Error  *struct {
		Class string `json:"class"`
		Desc  string `json:"desc"`
	} `json:"error"`
	Event string `json:"event"`
	Data  struct {
		Reason string `json:"reason"`
	} `json:"data"`
	Greeting json.RawMessage `json:"QMP"`
}

const (
	longestAnswer  = 64 << 10
	answerPatience = 5 * time.Second
)

// converse takes up a connection to the socket. The caller closes it.
func converse(ctx context.Context, conn net.Conn) (*monitor, error) {
	m := &monitor{conn: conn, answers: make(chan answer), gone: make(chan struct{})}
	go m.listen()
	if err := m.do(ctx, ""); err != nil { // the greeting
		m.close()
		return nil, err
	}
	if err := m.do(ctx, "qmp_capabilities"); err != nil {
		m.close()
		return nil, err
	}
	return m, nil
}

// listen takes events as they come and hands answers to who waits for one.
func (m *monitor) listen() {
	defer close(m.gone)
	lines := bufio.NewScanner(m.conn)
	lines.Buffer(make([]byte, 4096), longestAnswer)
	for lines.Scan() {
		var a answer
		if json.Unmarshal(lines.Bytes(), &a) != nil {
			break
		}
		if a.Event != "" {
			m.note(a)
			continue
		}
		select {
		case m.answers <- a:
		case <-time.After(answerPatience): // nobody asked
		}
	}
	m.conn.Close()
}

func (m *monitor) note(event answer) {
	if event.Event != "SHUTDOWN" && event.Event != "GUEST_PANICKED" {
		return
	}
	m.last.Lock()
	defer m.last.Unlock()
	if m.why == "" {
		m.why = printable(event.Event + " " + event.Data.Reason)
	}
}

// ended is why the guest ended the machine, as QEMU said; "" where it did not say.
func (m *monitor) ended() string {
	m.last.Lock()
	defer m.last.Unlock()
	return m.why
}

// do has QEMU execute a command without arguments; "" waits for its greeting.
func (m *monitor) do(ctx context.Context, command string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	what := "the greeting"
	if command != "" {
		what = command
		if err := m.conn.SetWriteDeadline(time.Now().Add(answerPatience)); err != nil {
			return fmt.Errorf("qemu monitor: %w", err)
		}
		if _, err := io.WriteString(m.conn, `{"execute":"`+command+"\"}\n"); err != nil {
			return fmt.Errorf("qemu monitor: %s: %w", command, err)
		}
	}
	timer := time.NewTimer(answerPatience)
	defer timer.Stop()
	select {
	case a := <-m.answers:
		switch {
		case a.Error != nil:
			return fmt.Errorf("qemu monitor: %s: %s", what, printable(a.Error.Desc))
		case command == "" && a.Greeting == nil || command != "" && a.Return == nil:
			return fmt.Errorf("qemu monitor: %s: an answer to something else", what)
		}
		return nil
	case <-m.gone:
		return fmt.Errorf("qemu monitor: %s: %w", what, errors.Join(io.ErrUnexpectedEOF, ctx.Err()))
	case <-ctx.Done():
		return fmt.Errorf("qemu monitor: %s: %w", what, context.Cause(ctx))
	case <-timer.C:
		m.conn.Close() // what comes now would be taken for another's answer
		return fmt.Errorf("qemu monitor: %s: no answer within %s", what, answerPatience)
	}
}

func (m *monitor) close() {
	m.conn.Close()
	<-m.gone
}

// printable cuts what somebody else wrote to one line that a terminal shows as it is.
func printable(text string) string {
	const most = 300
	out := make([]byte, 0, min(len(text), most))
	for i := 0; i < len(text) && len(out) < most; i++ {
		if c := text[i]; c >= ' ' && c < 0x7f {
			out = append(out, c)
		} else {
			out = append(out, '?')
		}
	}
	return string(out)
}
