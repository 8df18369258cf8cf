package wire

import (
	"bytes"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"strings"
	"time"
	"unicode"
)

// A machine with a kernel of its own is greeted on every new wire, before the first
// frame. Lines go both ways, each with a line's end before it too:
//
//	host   cal-wire 1 NONCE ENTROPY UNIXNANO
//	guest  cal-wire 1 NONCE ok           or   cal-wire 1 NONCE error TEXT
//	host   cal-wire 1 NONCE go UNIXNANO
//	guest  cal-wire 1 NONCE taken
//
// or, where the machine is to end with its disks flushed,
//
//	host   cal-wire 1 end
//
// What stands on a serial port from an earlier connection, a greeting of which nobody
// heard the answer included, is passed over by both: the nonce is new each time, and
// the guest takes no greeting that is not followed by its "go". Wires are taken in the order
// in which the host greets on them, whichever the guest reads first: a greeting is over
// when it was heard that the wire is taken. By the entropy a machine
// that was restored from a snapshot draws other random numbers than its twin.
// Nothing here says who is at the other end.

const (
	greetingWord = "cal-wire 1 "
	entropyBytes = 64
	maxGreeting  = 256       // bytes of a line to the guest
	maxRefusal   = 1 << 10   // bytes of TEXT
	maxStale     = 512 << 10 // bytes that the host passes over
)

const takenPatience = time.Second // at least, with a guest that was told to go

// Greeting is what the host says on a new wire.
type Greeting struct {
	Nonce   string             // 32 hexadecimal digits
	Entropy [entropyBytes]byte // for the kernel's random numbers
	Time    time.Time          // by the host's wall clock
}

func (g Greeting) line() string {
	return fmt.Sprintf("\n%s%s %x %d\n", greetingWord, g.Nonce, g.Entropy, g.Time.UnixNano())
}

// parseGreeting takes exactly what line writes.
func parseGreeting(line string) (Greeting, bool) {
	var g Greeting
	fields := strings.Split(strings.TrimPrefix(line, greetingWord), " ")
	if len(fields) != 3 {
		return g, false
	}
	entropy, err := hex.DecodeString(fields[1])
	nano, errTime := strconv.ParseInt(fields[2], 10, 64)
	if err != nil || errTime != nil || len(entropy) != entropyBytes || !isNonce(fields[0]) {
		return g, false
	}
	g.Nonce, g.Time = fields[0], time.Unix(0, nano)
	copy(g.Entropy[:], entropy)
	return g, strings.Trim(g.line(), "\n") == line
}

// isGo takes the line that confirms a greeting.
func (g *Greeting) isGo(line string) bool {
	text, ok := strings.CutPrefix(line, greetingWord+g.Nonce+" go ")
	nano, err := strconv.ParseInt(text, 10, 64)
	if !ok || err != nil || strconv.FormatInt(nano, 10) != text {
		return false
	}
	g.Time = time.Unix(0, nano)
	return true
}

func isNonce(s string) bool {
	raw, err := hex.DecodeString(s)
	return err == nil && len(raw) == 16
}

// Greet is the host's part on a new wire. It returns the wire, on which a guest can
// still say why it ends: reading then fails with that reason. On an error, which after
// the deadline, or up to a second later, is os.ErrDeadlineExceeded, conn is of no more use; the caller closes it, and
// may greet anew on another connection.
func Greet(conn net.Conn, deadline time.Time) (net.Conn, error) {
	if err := conn.SetDeadline(deadline); err != nil {
		return nil, err
	}
	g := Greeting{Time: time.Now()}
	var nonce [16]byte
	rand.Read(nonce[:])
	rand.Read(g.Entropy[:])
	g.Nonce = hex.EncodeToString(nonce[:])
	if _, err := io.WriteString(conn, g.line()); err != nil {
		return nil, fmt.Errorf("greeting the guest: %w", err)
	}
	mine := greetingWord + g.Nonce + " "
	if err := hear(conn, mine, "ok"); err != nil {
		return nil, err
	}
	// The greeting may have waited for the guest's boot: the time is said again.
	if _, err := fmt.Fprintf(conn, "\n%sgo %d\n", mine, time.Now().UnixNano()); err != nil {
		return nil, fmt.Errorf("greeting the guest: %w", err)
	}
	// That cannot be taken back: the guest gets the time to say that it has heard it.
	if late := time.Now().Add(takenPatience); late.After(deadline) {
		if err := conn.SetReadDeadline(late); err != nil {
			return nil, err
		}
	}
	if err := hear(conn, mine, "taken"); err != nil {
		return nil, err
	}
	return &greeted{Conn: conn, refusal: []byte("\n" + mine + "error ")}, conn.SetDeadline(time.Time{})
}

// ErrRefused is the error of a guest that says why it refuses to serve.
var ErrRefused = errors.New("the guest refuses to serve")

// hear reads until the guest has said word, or why it refuses.
func hear(conn io.Reader, mine, word string) error {
	answer, err := findLine(conn, maxStale, len(mine)+len("error ")+maxRefusal, func(line string) bool {
		return line == mine+word || strings.HasPrefix(line, mine+"error ")
	})
	if err != nil {
		return fmt.Errorf("the guest did not say %q to the greeting: %w", word, err)
	}
	if text, refused := strings.CutPrefix(answer, mine+"error "); refused {
		return fmt.Errorf("%w: %s", ErrRefused, printable(text))
	}
	return nil
}

// ErrEnd is what AnswerGreeting returns where the host asks the machine to end.
var ErrEnd = errors.New("the host asked the machine to end")

// SayEnd is said instead of a greeting: the machine ends, with its disks flushed. Who
// asks waits for that as long as he likes, and then ends it by force.
func SayEnd(conn net.Conn, deadline time.Time) error {
	if err := conn.SetWriteDeadline(deadline); err != nil {
		return err
	}
	_, err := io.WriteString(conn, "\n"+greetingWord+"end\n")
	return err
}

// AnswerGreeting is the guest's part: it reads until the host has greeted and has heard
// the answer. welcome is called for each greeting and must do what the guest owes
// before it says ok, that is, take the entropy and the time; its error refuses the host, and is
// returned. taken is called once, for the greeting that is returned, with the time of its end: until it
// returns the host greets on no other wire. The wire's first byte comes next.
func AnswerGreeting(conn io.ReadWriter, welcome func(Greeting) error, taken func(Greeting)) (Greeting, error) {
	var g Greeting // the newest that was answered
	for {
		heard, ends := false, false
		_, err := findLine(conn, 0, maxGreeting, func(line string) bool {
			next, ok := parseGreeting(line)
			switch {
			case ok:
				g = next
			case line == greetingWord+"end":
				ends = true
			case g.Nonce != "":
				heard = g.isGo(line)
			}
			return ok || heard || ends
		})
		if ends && err == nil {
			err = ErrEnd
		}
		if err != nil {
			return g, err
		}
		if heard {
			taken(g)
			_, _ = fmt.Fprintf(conn, "\n%s%s taken\n", greetingWord, g.Nonce) // who has gone since is missed by the wire's reader
			return g, nil
		}
		if err := welcome(g); err != nil {
			return g, errors.Join(err, SayRefusal(conn, g.Nonce, err.Error()))
		}
		if _, err := fmt.Fprintf(conn, "\n%s%s ok\n", greetingWord, g.Nonce); err != nil {
			return g, err
		}
	}
}

// SayRefusal tells the host, as the last that it reads, why the wire that it greeted with
// nonce ends.
func SayRefusal(conn io.Writer, nonce, text string) error {
	_, err := io.WriteString(conn, "\n"+greetingWord+nonce+" error "+printable(text)+"\n")
	return err
}

// printable makes one line of what anybody wrote.
func printable(text string) string {
	text = strings.Map(func(r rune) rune {
		switch {
		case r == '\n' || r == '\t':
			return ' '
		case r == unicode.ReplacementChar || !unicode.IsPrint(r):
			return '?'
		}
		return r
	}, text)
	if len(text) > maxRefusal {
		text = strings.ToValidUTF8(text[:maxRefusal], "")
	}
	return text
}

// findLine reads up to the end of the first line that is wanted and not one byte
// further. most is how many bytes may be read, 0: any number.
func findLine(r io.Reader, most, longest int, wanted func(string) bool) (string, error) {
	var line []byte
	var one [1]byte
	for total := 0; most == 0 || total < most; total++ {
		if _, err := io.ReadFull(r, one[:]); err != nil {
			return "", err
		}
		switch {
		case one[0] != '\n':
			if len(line) <= longest { // a longer one is not wanted
				line = append(line, one[0])
			}
		case len(line) <= longest && wanted(string(line)):
			return string(line), nil
		default:
			line = line[:0]
		}
	}
	return "", fmt.Errorf("%d bytes of something else", most)
}

// greeted is a wire whose guest can say why it ends.
type greeted struct {
	net.Conn
	refusal []byte // with what the guest's reason begins
	matched int    // bytes of refusal that were the last ones read
	reason  error
}

func (g *greeted) Read(p []byte) (int, error) {
	if g.reason != nil {
		return 0, g.reason
	}
	n, err := g.Conn.Read(p)
	if at, found := g.find(p[:n]); found {
		g.reason = fmt.Errorf("the proxy did not take the new wire: %s", g.readReason(p[min(at, n):n]))
		if n = max(0, at-len(g.refusal)); n == 0 {
			return 0, g.reason
		}
		return n, nil
	}
	return n, err
}

// find returns where in p the refusal's text begins. A refusal that comes in two parts
// is found too; its first part has then been read as if it were the wire's.
func (g *greeted) find(p []byte) (int, bool) {
	if g.matched > 0 {
		rest := g.refusal[g.matched:]
		if k := min(len(rest), len(p)); bytes.Equal(p[:k], rest[:k]) {
			g.matched += k
			return k, g.matched == len(g.refusal)
		}
		g.matched = 0
	}
	if i := bytes.Index(p, g.refusal); i >= 0 {
		return i + len(g.refusal), true
	}
	tail := p[max(0, len(p)-len(g.refusal)+1):]
	if i := bytes.LastIndexByte(tail, '\n'); i >= 0 && bytes.HasPrefix(g.refusal, tail[i:]) {
		g.matched = len(tail) - i
	}
	return 0, false
}

// readReason reads the rest of the guest's last line, of which text has arrived.
func (g *greeted) readReason(text []byte) string {
	text = bytes.Clone(text)
	_ = g.SetReadDeadline(time.Now().Add(time.Second)) // nothing else will be read
	for !bytes.ContainsRune(text, '\n') && len(text) < maxRefusal {
		var more [maxRefusal]byte
		n, err := g.Conn.Read(more[:])
		text = append(text, more[:n]...)
		if err != nil {
			break
		}
	}
	line, _, _ := strings.Cut(string(text), "\n")
	return printable(line)
}
