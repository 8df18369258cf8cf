package authority

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"sync"
	"syscall"
	"time"
	"unicode/utf8"

	"golang.org/x/term"

	"cal/approval"
)

// ErrInterrupted is the error of a person who left by Ctrl-C.
var ErrInterrupted = errors.New("interrupted")

// The keys that are more than a character.
const (
	keyEnter     = "enter"
	keyEscape    = "escape"
	keyErase     = "erase"
	keyKill      = "kill"
	keyInterrupt = "interrupt"
	keyUp        = "up"
	keyDown      = "down"
	keyLeft      = "left"
	keyPageUp    = "page up"
	keyPageDown  = "page down"
	keyHome      = "home"
	keyEnd       = "end"
	keyOther     = "" // a key that means nothing here
)

// keyEvent is what came in one read of the terminal.
type keyEvent struct {
	keys []string
	at   time.Time
}

// sequences are what terminals send behind ESC for the keys that mean something here
// (ECMA-48 and xterm).
var sequences = map[string]string{
	"[A": keyUp, "[B": keyDown, "[D": keyLeft, "OA": keyUp, "OB": keyDown, "OD": keyLeft,
	"[5~": keyPageUp, "[6~": keyPageDown, "[H": keyHome, "[F": keyEnd, "[1~": keyHome, "[4~": keyEnd, "OH": keyHome, "OF": keyEnd,
}

// keysIn takes apart what a terminal sent. A sequence that is not known is one key that
// means nothing.
func keysIn(raw []byte) (keys []string) {
	for len(raw) > 0 {
		size := 1
		switch c := raw[0]; {
		case c == 0x1b && len(raw) > 1 && (raw[1] == '[' || raw[1] == 'O'):
			for size = 2; size < len(raw) && (raw[size] < 0x40 || raw[size] > 0x7e); size++ {
			}
			size = min(size+1, len(raw))
			keys = append(keys, sequences[string(raw[1:size])])
		case c == 0x1b && len(raw) > 1: // Alt and a key
			size = 2
			keys = append(keys, keyOther)
		case c == 0x1b:
			keys = append(keys, keyEscape)
		case c == '\r' || c == '\n':
			keys = append(keys, keyEnter)
		case c == 0x7f || c == 0x08:
			keys = append(keys, keyErase)
		case c == 0x15:
			keys = append(keys, keyKill)
		case c == 0x03:
			keys = append(keys, keyInterrupt)
		case c < 0x20:
			keys = append(keys, keyOther)
		default:
			_, size = utf8.DecodeRune(raw)
			keys = append(keys, string(raw[:size]))
		}
		raw = raw[size:]
	}
	return keys
}

// Whatever ran at the terminal before, the output of a machine for one, may have left it in
// a state in which a screen does not show what is written to it, or shows what was written
// before. cleanModes takes back all that a terminal can be told to keep: margins and origin,
// insert mode, attributes, character sets, colours, modes of keys and mouse. What a terminal
// does not know it passes over (ECMA-48, DEC STD 070, xterm's control sequences).
const (
	cleanModes = "\x1b[!p" + // soft reset
		"\x1b[r\x1b[?69l\x1b[?6l" + // margins, origin
		"\x1b[2l\x1b[4l\x1b[20l\x1b[?5l\x1b[?7h" + // locked keys, insert, newline, reverse; wrap
		"\x1b[0m\x1b[0\"q\x1b%G\x1b(B\x1b)B\x1b*B\x1b+B\x0f" + // attributes, character sets
		"\x1b]104\a\x1b]110\a\x1b]111\a\x1b]112\a" + // colours
		"\x1b[?1l\x1b>\x1b[?1000l\x1b[?1002l\x1b[?1003l\x1b[?1004l\x1b[?1006l\x1b[?2004l\x1b[<9u\x1b[>4m" // keys, mouse
	clearScreen = "\x1b[2J\x1b[H"

	// The alternate screen without a cursor, and back.
	enterScreen = "\x1b[?1049h" + cleanModes + clearScreen + "\x1b[?25l"
	leaveScreen = cleanModes + clearScreen + "\x1b[?25h\x1b[?1049l"
)

const (
	listEvery = 500 * time.Millisecond // the list is read anew
	drawEvery = 200 * time.Millisecond // the clocks on the screen go on
	wipeEvery = time.Second            // all is drawn again, whoever else has written to the terminal
)

// Queue shows all that waits on a whole screen and lets the person decide, until they leave.
// With the id of an ask it shows that one, and ends with it: ErrNotGranted says that the
// person did not grant. plain draws without colours. The terminal must not be dumb.
func (p *Prompt) Queue(ctx context.Context, c asks, key Key, reason, id string, plain bool) error {
	q := &queue{asks: c, sealed: key, reason: reason, only: id}
	if err := p.decideOn(ctx, q, plain); err != nil || id == "" {
		return err
	}
	if err := p.print("%s\n", q.note); err != nil {
		return err
	}
	if !q.granted {
		return fmt.Errorf("%w: ask %s", ErrNotGranted, approval.Visible(id))
	}
	return nil
}

func (p *Prompt) decideOn(ctx context.Context, q *queue, plain bool) (err error) {
	leave, err := p.enterWhole()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, leave()) }()

	ctx, cancel := context.WithCancel(ctx)
	var working sync.WaitGroup
	defer working.Wait()
	defer cancel()
	events := make(chan any)
	send := func(event any) {
		select {
		case events <- event:
		case <-ctx.Done():
		}
	}
	run := func(do effect) {
		if do != nil {
			working.Go(func() { send(do(ctx)) })
		}
	}
	go p.keys(ctx, send) // ends with the process: a read of a terminal cannot be called off
	working.Go(func() { follow(ctx, q.asks, send) })
	resized := make(chan os.Signal, 1)
	signal.Notify(resized, syscall.SIGWINCH)
	defer signal.Stop(resized)
	tick := time.NewTicker(drawEvery)
	defer tick.Stop()

	defer q.forget()
	q.update(time.Now(), p.size())
	if q.only != "" {
		run(q.read(q.only))
	}
	var drawn time.Time
	for shown := ""; !q.leave; {
		if q.flush {
			q.flush = false
			if err := dropTyped(int(p.tty.Fd())); err != nil {
				return err
			}
		}
		if text := q.view().text(plain); text != shown || time.Since(drawn) >= wipeEvery {
			if err := p.print("%s", text); err != nil {
				return err
			}
			shown, drawn = text, time.Now()
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-resized:
			q.update(time.Now(), p.size())
			shown = "" // the terminal may have moved what was there
		case <-tick.C:
			q.update(time.Now(), nil)
		case event := <-events:
			if err, ended := event.(error); ended {
				return err
			}
			run(q.update(time.Now(), event))
		}
	}
	if q.interrupted {
		return ErrInterrupted
	}
	return nil
}

func (p *Prompt) size() sizeEvent {
	width, height, err := term.GetSize(int(p.tty.Fd()))
	if err != nil || width <= 0 || height <= 0 {
		return sizeEvent{80, 24}
	}
	return sizeEvent{width, height}
}

// enterWhole takes the whole screen and each key; leave puts the terminal back.
func (p *Prompt) enterWhole() (leave func() error, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	old, err := term.MakeRaw(int(p.tty.Fd()))
	if err != nil {
		return nil, err
	}
	p.whole = true
	leave = func() error {
		p.mu.Lock()
		defer p.mu.Unlock()
		// What was typed and not read is no command of the shell's.
		return errors.Join(p.leaveScreen(), dropTyped(int(p.tty.Fd())), term.Restore(int(p.tty.Fd()), old))
	}
	if _, err := p.tty.WriteString(enterScreen); err != nil {
		return nil, errors.Join(err, p.leaveScreen(), term.Restore(int(p.tty.Fd()), old))
	}
	return leave, nil
}

// leaveScreen shows again what stood there before the alternate screen, once: on any other
// screen it would wipe what the person had. mu is held.
func (p *Prompt) leaveScreen() error {
	if !p.whole {
		return nil
	}
	p.whole = false
	_, err := p.tty.WriteString(leaveScreen)
	return err
}

// keys sends what is typed, with the time at which it came.
func (p *Prompt) keys(ctx context.Context, send func(any)) {
	raw := make([]byte, 1024)
	for ctx.Err() == nil {
		n, err := p.tty.Read(raw)
		if n > 0 {
			send(keyEvent{keysIn(raw[:n]), time.Now()})
			clear(raw[:n])
		}
		if err != nil {
			send(fmt.Errorf("the terminal is gone: %w", err))
			return
		}
	}
}

// follow sends the list again and again.
func follow(ctx context.Context, from asks, send func(any)) {
	tick := time.NewTicker(listEvery)
	defer tick.Stop()
	for {
		send(list(ctx, from))
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

// text is a frame as the terminal takes it: each line from its left edge, and nothing left
// behind it.
func (f frame) text(plain bool) string {
	var out strings.Builder
	out.WriteString(cleanModes + "\x1b[?25l\x1b[H")
	for i, line := range f.lines {
		if i > 0 {
			out.WriteString("\r\n")
		}
		if f.strong[i] && !plain {
			line = "\x1b[7m" + line + "\x1b[0m"
		}
		out.WriteString(line + "\x1b[K")
	}
	if f.row >= 0 {
		fmt.Fprintf(&out, "\x1b[%d;%dH\x1b[?25h", f.row+1, f.col+1)
	}
	return out.String()
}
