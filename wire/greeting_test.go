package wire

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"testing"
	"testing/iotest"
	"testing/synctest"
	"time"
	"unicode"
)

// wirePair is a connection of which either end buffers, as a socket does.
func wirePair(t testing.TB) (host, guest net.Conn) {
	t.Helper()
	l, err := net.Listen("unix", t.TempDir()+"/s")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if host, err = net.Dial("unix", l.Addr().String()); err != nil {
		t.Fatal(err)
	}
	if guest, err = l.Accept(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { host.Close(); guest.Close() })
	return host, guest
}

func soon() time.Time { return time.Now().Add(10 * time.Second) }

type answered struct {
	greeting Greeting
	err      error
}

func answering(conn io.ReadWriter, welcome func(Greeting) error) <-chan answered {
	done := make(chan answered, 1)
	go func() {
		g, err := AnswerGreeting(conn, welcome, func(Greeting) {})
		done <- answered{g, err}
	}()
	return done
}

func welcome(Greeting) error { return nil }

// TestGreeting: after the greeting not one byte is missing or too many, either way.
func TestGreeting(t *testing.T) {
	seen := map[string]bool{}
	for range 2 {
		host, guest := wirePair(t)
		before := time.Now()
		done := answering(guest, func(g Greeting) error {
			if g.Time.Before(before.Truncate(time.Nanosecond)) || g.Time.After(time.Now()) {
				return fmt.Errorf("time %s", g.Time)
			}
			return nil
		})
		wire, err := Greet(host, soon())
		if err != nil {
			t.Fatal(err)
		}
		got := <-done
		if got.err != nil {
			t.Fatal(got.err)
		}
		entropy := string(got.greeting.Entropy[:])
		if seen[entropy] || seen[got.greeting.Nonce] || strings.Count(entropy, "\x00") > 32 {
			t.Errorf("entropy %x, nonce %s", entropy, got.greeting.Nonce)
		}
		seen[entropy], seen[got.greeting.Nonce] = true, true
		for _, way := range [][2]net.Conn{{wire, guest}, {guest, wire}} {
			io.WriteString(way[0], "\nfirst\n")
			buf := make([]byte, 7)
			if _, err := io.ReadFull(way[1], buf); err != nil || string(buf) != "\nfirst\n" {
				t.Errorf("after the greeting: %q, %v", buf, err)
			}
		}
	}
}

// TestGreetingAfterStaleBytes: a serial port still holds what an earlier connection left
// behind, in both directions.
func TestGreetingAfterStaleBytes(t *testing.T) {
	old := Greeting{Nonce: strings.Repeat("ab", 16), Time: time.Unix(1, 2)}
	for name, stale := range map[string][2]string{ // to the guest, to the host
		"half a frame":        {"\x00\x00\x00\x01half a fr", "\x00\x01"},
		"a line's beginning":  {greetingWord, greetingWord + "0123"},
		"an old greeting":     {old.line(), "\n" + greetingWord + old.Nonce + " ok\n"},
		"two and an old go":   {old.line() + old.line() + "\n" + greetingWord + strings.Repeat("0", 32) + " go 5\n", ""},
		"an old refusal":      {"", "\n" + greetingWord + old.Nonce + " error old\n"},
		"long lines":          {strings.Repeat("x", 1<<20) + "\n", strings.Repeat("y", 1<<16)},
		"a go without answer": {"\n" + greetingWord + old.Nonce + " go 5\n", ""},
	} {
		t.Run(name, func(t *testing.T) {
			host, guest := wirePair(t)
			go func() {
				io.WriteString(guest, stale[1])
				AnswerGreeting(guest, welcome, func(Greeting) {})
			}()
			staleToGuest := answering(struct {
				io.Reader
				io.Writer
			}{strings.NewReader(stale[0]), io.Discard}, welcome)
			if got := <-staleToGuest; got.err != io.EOF {
				t.Errorf("stale bytes alone: %v", got.err)
			}
			io.WriteString(host, stale[0])
			if _, err := Greet(host, soon()); err != nil {
				t.Fatal(err)
			}
		})
	}
}

// TestGreetingIsHeard: the guest does not take a greeting for the wire's whose answer
// nobody has heard.
func TestGreetingIsHeard(t *testing.T) {
	host, guest := wirePair(t)
	times := 0
	done := answering(guest, func(Greeting) error { times++; return nil })
	lost := Greeting{Nonce: strings.Repeat("ab", 16), Time: time.Unix(1, 2)}
	io.WriteString(host, lost.line())
	if _, err := Greet(host, soon()); err != nil {
		t.Fatal(err)
	}
	if got := <-done; got.err != nil || got.greeting.Nonce == lost.Nonce || times != 2 {
		t.Errorf("greeting %s after %d: %v", got.greeting.Nonce, times, got.err)
	}
}

// TestGreetingInOrder: the host has greeted on a wire when the guest has said whose it is, and
// not before: what it greets on next comes after it.
func TestGreetingInOrder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		host, guest := net.Pipe()
		defer host.Close()
		busy := make(chan struct{})
		go AnswerGreeting(guest, welcome, func(Greeting) { <-busy })
		over := false
		go func() {
			if _, err := Greet(host, soon()); err != nil {
				t.Error(err)
			}
			over = true
		}()
		synctest.Wait()
		if over {
			t.Error("the greeting is over before the wire is taken")
		}
		close(busy)
		synctest.Wait()
		if !over { // control
			t.Error("the greeting is not over after the wire was taken")
		}
	})
}

// TestWelcomeBeforeOK: what a guest owes is done before it says anything.
func TestWelcomeBeforeOK(t *testing.T) {
	host, guest := wirePair(t)
	said := 0
	counted := struct {
		io.Reader
		io.Writer
	}{guest, writes(func(p []byte) (int, error) { said += len(p); return guest.Write(p) })}
	before := -1
	done := answering(counted, func(Greeting) error { before = said; return nil })
	if _, err := Greet(host, soon()); err != nil {
		t.Fatal(err)
	}
	if got := <-done; got.err != nil || before != 0 || said == 0 {
		t.Errorf("of %d bytes %d were said before: %v", said, before, got.err)
	}
}

type writes func([]byte) (int, error)

func (w writes) Write(p []byte) (int, error) { return w(p) }

// TestGreetingTakenLate: a guest that was told to go, be it just before the deadline, has a second to say that
// it has heard it, and no more.
func TestGreetingTakenLate(t *testing.T) {
	for late, want := range map[time.Duration]error{takenPatience / 2: nil, 2 * takenPatience: os.ErrDeadlineExceeded} {
		synctest.Test(t, func(t *testing.T) {
			host, guest := net.Pipe()
			deadline, over := soon(), make(chan struct{})
			go func() {
				defer close(over)
				ready := func(Greeting) error { time.Sleep(time.Until(deadline) - takenPatience/10); return nil }
				AnswerGreeting(guest, ready, func(Greeting) { time.Sleep(late) })
			}()
			defer func() { host.Close(); <-over }()
			wired, err := Greet(host, deadline)
			if !errors.Is(err, want) {
				t.Errorf("taken %s late: %v, want %v", late, err, want)
			}
			if err != nil {
				return
			}
			time.Sleep(time.Minute) // of the bubble's: no deadline is left on the wire
			go guest.Write([]byte("x"))
			if _, err := wired.Read(make([]byte, 1)); err != nil {
				t.Errorf("taken %s late: the wire ends: %v", late, err)
			}
		})
	}
}

// TestSayEnd: the host can ask for the end where the guest waits for a greeting, and nobody
// takes the wire's own bytes for that.
func TestSayEnd(t *testing.T) {
	host, guest := wirePair(t)
	done := answering(guest, welcome)
	io.WriteString(host, "stale "+greetingWord+"end")
	if err := SayEnd(host, soon()); err != nil {
		t.Fatal(err)
	}
	if got := <-done; !errors.Is(got.err, ErrEnd) {
		t.Errorf("asked to stop: %v", got.err)
	}
}

func TestGreetingRefused(t *testing.T) {
	host, guest := wirePair(t)
	done := answering(guest, func(Greeting) error {
		return errors.New("eth0 is\nthere \x1b[31m\xff" + strings.Repeat("ä", 1<<10))
	})
	_, err := Greet(host, soon())
	if err == nil || !strings.HasPrefix(err.Error(), "the guest refuses to serve: eth0 is there ?[31m?ää") || len(err.Error()) > 1100 {
		t.Errorf("host: %v", err)
	}
	if got := <-done; got.err == nil {
		t.Error("the guest took a greeting that it refused")
	}
}

func TestGreetingDeadline(t *testing.T) {
	host, guest := wirePair(t)
	go io.Copy(io.Discard, guest)
	if _, err := Greet(host, time.Now().Add(20*time.Millisecond)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("a guest that is silent: %v", err)
	}
	flooded, flood := wirePair(t)
	go func() {
		for {
			if _, err := flood.Write(make([]byte, 1<<16)); err != nil {
				return
			}
		}
	}()
	if _, err := Greet(flooded, soon()); err == nil || !strings.Contains(err.Error(), "524288 bytes of something else") {
		t.Errorf("a guest that floods: %v", err)
	}
	gone, guestGone := wirePair(t)
	guestGone.Close()
	if _, err := Greet(gone, soon()); err == nil {
		t.Error("a guest that is gone was greeted")
	}
}

// pieces is a connection that reads what is given, as often as it was given.
type pieces struct {
	net.Conn
	left [][]byte
}

func (p *pieces) Read(b []byte) (int, error) {
	if len(p.left) == 0 {
		return 0, io.EOF
	}
	n := copy(b, p.left[0])
	if p.left[0] = p.left[0][n:]; len(p.left[0]) == 0 {
		p.left = p.left[1:]
	}
	return n, nil
}

func (p *pieces) SetReadDeadline(time.Time) error { return nil }

// TestLaterRefusal: however the guest's last line arrives, the reader learns the reason,
// and what was sent before it is complete.
func TestLaterRefusal(t *testing.T) {
	const nonce = "00112233445566778899aabbccddeeff"
	var said bytes.Buffer
	if err := SayRefusal(&said, nonce, "no\nproof"); err != nil {
		t.Fatal(err)
	}
	before := "\nthe wire's own\n" + greetingWord + "\n\n"
	all := []byte(before + said.String() + "more")
	for cut := 1; cut < len(all); cut++ {
		conn := &greeted{Conn: &pieces{left: [][]byte{all[:cut], all[cut:]}}, refusal: []byte("\n" + greetingWord + nonce + " error ")}
		got, err := io.ReadAll(conn)
		if err == nil || err.Error() != "the proxy did not take the new wire: no proof" {
			t.Errorf("cut at %d: %v", cut, err)
		}
		if !bytes.HasPrefix(got, []byte(before)) {
			t.Errorf("cut at %d: read %q", cut, got)
		}
		if _, err := conn.Read(make([]byte, 1)); err == nil {
			t.Errorf("cut at %d: reads on", cut)
		}
	}
	conn := &greeted{Conn: &pieces{left: [][]byte{all}}, refusal: []byte("\n" + greetingWord + strings.Repeat("0", 32) + " error ")}
	if got, err := io.ReadAll(conn); err != nil || !bytes.Equal(got, all) { // control: another's refusal is data
		t.Errorf("another nonce: %q, %v", got, err)
	}
}

// FuzzGreeted: whatever passes, a wire without a refusal is the bytes that were sent.
func FuzzGreeted(f *testing.F) {
	f.Add([]byte("\ncal-wire 1 00"), []byte("112233445566778899aabbccddeeff error x"))
	f.Add([]byte("\n\n"), []byte("\n"))
	refusal := []byte("\n" + greetingWord + "00112233445566778899aabbccddeeff error ")
	f.Fuzz(func(t *testing.T, a, b []byte) {
		all := append(bytes.Clone(a), b...)
		conn := &greeted{Conn: &pieces{left: [][]byte{a, b}}, refusal: refusal}
		got, err := io.ReadAll(conn)
		if at := bytes.Index(all, refusal); at < 0 {
			if err != nil || !bytes.Equal(got, all) {
				t.Errorf("%q %q: read %q, %v", a, b, got, err)
			}
		} else if err == nil || !bytes.HasPrefix(got, all[:at]) || len(got) >= at+len(refusal) {
			t.Errorf("%q %q: read %q, %v", a, b, got, err)
		}
	})
}

// FuzzAnswerGreeting: no bytes but a greeting and its go open the wire, and then not one
// is lost.
func FuzzAnswerGreeting(f *testing.F) {
	g := Greeting{Nonce: strings.Repeat("ab", 16), Time: time.Unix(1, 2)}
	f.Add([]byte("x" + g.line() + "\n" + greetingWord + g.Nonce + " go 17\nrest"))
	f.Add([]byte(g.line()))
	f.Add([]byte("\n" + greetingWord + " go 1\n"))
	f.Add([]byte("\n" + greetingWord + "end\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		in := bytes.NewReader(data)
		var answers bytes.Buffer
		taken := 0
		got, err := AnswerGreeting(struct {
			io.Reader
			io.Writer
		}{iotest.OneByteReader(in), &answers}, welcome, func(Greeting) { taken++ })
		if taken > 1 || (taken == 1) != (err == nil) {
			t.Errorf("%d wires taken, %v", taken, err)
		}
		if err != nil {
			return
		}
		read := data[:len(data)-in.Len()]
		end := fmt.Sprintf("\n%s%s go %d\n", greetingWord, got.Nonce, got.Time.UnixNano())
		if !bytes.Contains(read, fmt.Appendf(nil, "%s%s %x ", greetingWord, got.Nonce, got.Entropy)) || !bytes.HasSuffix(append([]byte("\n"), read...), []byte(end)) {
			t.Errorf("%q opened the wire of %s", read, got.Nonce)
		}
		if mine := greetingWord + got.Nonce; !strings.HasSuffix(answers.String(), mine+" ok\n\n"+mine+" taken\n") {
			t.Errorf("answers %q", answers.String())
		}
	})
}

// scripted answers whatever it is greeted with by text in which NONCE stands for the nonce.
type scripted struct {
	net.Conn
	text   string
	answer io.Reader
}

func (s *scripted) Write(p []byte) (int, error) {
	if s.answer == nil {
		nonce := strings.Split(string(p), " ")[2]
		s.answer = strings.NewReader(strings.ReplaceAll(s.text, "NONCE", nonce))
	}
	return len(p), nil
}
func (s *scripted) Read(p []byte) (int, error)        { return s.answer.Read(p) }
func (s *scripted) SetDeadline(time.Time) error       { return nil }
func (s *scripted) SetReadDeadline(t time.Time) error { return nil }

// FuzzGreet: a hostile guest's words are bounded, printable, and open nothing but by its nonce.
func FuzzGreet(f *testing.F) {
	f.Add("\ncal-wire 1 NONCE ok\n")
	f.Add("\ncal-wire 1 NONCE ok\n\ncal-wire 1 NONCE taken\n")
	f.Add("\ncal-wire 1 NONCE ok\n\ncal-wire 1 NONCE error late\n")
	f.Add("\ncal-wire 1 NONCE error a\x00b\n")
	f.Add("cal-wire 1 NONCE error " + strings.Repeat("x", 5000) + "\n")
	f.Fuzz(func(t *testing.T, text string) {
		conn, err := Greet(&scripted{text: text}, soon())
		if err == nil {
			mine := "\n" + greetingWord + "NONCE "
			_, after, ok := strings.Cut("\n"+text, mine+"ok\n")
			if taken := strings.Contains("\n"+after, mine+"taken\n"); conn == nil || !ok || !taken {
				t.Errorf("%q opened the wire", text)
			}
			return
		}
		if len(err.Error()) > maxRefusal+100 || strings.ContainsFunc(err.Error(), func(r rune) bool { return !unicode.IsPrint(r) }) {
			t.Errorf("%q: error %q", text, err)
		}
	})
}
