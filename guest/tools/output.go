package tools

import (
	"encoding/base64"
	"fmt"
	"io"
	"sync"
	"unicode/utf8"
)

// keeper holds the start and the end of a stream in bounded memory and counts
// what it cut between them.
type keeper struct {
	mu    sync.Mutex
	cap   int
	head  []byte
	tail  []byte // the last cap/2 bytes, as a ring once full
	at    int    // of the oldest byte in tail
	total int64
}

func newKeeper(cap int) *keeper { return &keeper{cap: cap} }

func (k *keeper) Write(p []byte) (int, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	n := len(p)
	k.total += int64(n)
	if room := k.cap - k.cap/2 - len(k.head); room > 0 {
		take := min(room, len(p))
		k.head, p = append(k.head, p[:take]...), p[take:]
	}
	limit := k.cap / 2
	if len(p) > limit {
		p = p[len(p)-limit:]
	}
	if room := limit - len(k.tail); room > 0 {
		take := min(room, len(p))
		k.tail, p = append(k.tail, p[:take]...), p[take:]
	}
	for len(p) > 0 {
		copied := copy(k.tail[k.at:], p)
		p, k.at = p[copied:], (k.at+copied)%limit
	}
	return n, nil
}

// take returns what is kept and forgets it, so that the next take returns what
// came since.
func (k *keeper) take() kept {
	k.mu.Lock()
	defer k.mu.Unlock()
	tail := append(append([]byte(nil), k.tail[k.at:]...), k.tail[:k.at]...)
	out := show(k.head, tail, k.total)
	k.head, k.tail, k.at, k.total = nil, nil, 0, 0
	return out
}

// kept is one stream of a command as a result shows it: text, or Base64 where it
// is not UTF-8; cut is how many bytes of it are not shown.
type kept struct {
	text   string
	base64 string
	cut    int64
}

func show(head, tail []byte, total int64) kept {
	cut := total - int64(len(head)+len(tail))
	if cut == 0 {
		whole := append(head[:len(head):len(head)], tail...)
		if utf8.Valid(whole) {
			return kept{text: string(whole)}
		}
		return kept{base64: base64.StdEncoding.EncodeToString(whole)}
	}
	start, end := trimRune(string(head)), string(tail)
	for i := 1; i < utf8.UTFMax && end != "" && !utf8.RuneStart(end[0]); i++ {
		end = end[1:]
	}
	if !utf8.ValidString(start) || !utf8.ValidString(end) {
		// Bytes with a hole mean nothing to a decoder: only the start is shown.
		return kept{base64: base64.StdEncoding.EncodeToString(head), cut: total - int64(len(head))}
	}
	cut = total - int64(len(start)+len(end))
	return kept{text: fmt.Sprintf("%s\n[... %d bytes cut ...]\n%s", start, cut, end), cut: cut}
}

// inlet is what a caller has sent for a command's input and the command has not
// yet taken: at most inletCap bytes, then put waits.
type inlet struct {
	mu     sync.Mutex
	change *sync.Cond
	data   []byte
	ended  bool // no more will be put
	closed bool // no more will be taken
}

const inletCap = 4 << 20

func newInlet() *inlet {
	in := &inlet{}
	in.change = sync.NewCond(&in.mu)
	return in
}

func (in *inlet) put(p []byte) {
	in.mu.Lock()
	defer in.mu.Unlock()
	for len(in.data) >= inletCap && !in.closed {
		in.change.Wait()
	}
	in.data = append(in.data, p...)
	in.change.Broadcast()
}

// end says that nothing more will be put.
func (in *inlet) end() {
	in.mu.Lock()
	defer in.mu.Unlock()
	in.ended = true
	in.change.Broadcast()
}

// Close says that nothing more will be taken.
func (in *inlet) Close() error {
	in.mu.Lock()
	defer in.mu.Unlock()
	in.closed, in.data = true, nil
	in.change.Broadcast()
	return nil
}

// Read gives what there is, and io.EOF after the end.
func (in *inlet) Read(p []byte) (int, error) {
	in.mu.Lock()
	defer in.mu.Unlock()
	for len(in.data) == 0 && !in.ended && !in.closed {
		in.change.Wait()
	}
	if len(in.data) == 0 {
		return 0, io.EOF
	}
	n := copy(p, in.data)
	in.data = in.data[n:]
	in.change.Broadcast()
	return n, nil
}
