package site

import (
	"io"
	"os"
	"strings"
	"sync"
)

// The bounds of a console.
const (
	ConsoleMost = 1 << 20  // bytes on disk, after Shorten
	ConsoleTail = 16 << 10 // bytes shown
)

// Tail returns the end of a file, "" where there is none.
func Tail(name string) string {
	file, err := os.Open(name)
	if err != nil {
		return ""
	}
	defer file.Close()
	info, err := file.Stat()
	if err != nil {
		return ""
	}
	from := max(0, info.Size()-ConsoleTail)
	data, err := io.ReadAll(io.NewSectionReader(file, from, ConsoleTail))
	if err != nil {
		return ""
	}
	return string(data)
}

// Shorten empties a console that has grown large, but for its end. Whoever
// writes it writes at the end of whatever is there.
func Shorten(name string) {
	info, err := os.Stat(name)
	if err != nil || info.Size() <= ConsoleMost {
		return
	}
	end := Tail(name)
	file, err := os.OpenFile(name, os.O_WRONLY|os.O_APPEND|os.O_TRUNC, 0)
	if err != nil {
		return
	}
	defer file.Close()
	_, _ = io.WriteString(file, end) // lost on a full disk; the console is a help, not a record
}

// LastLine is the last line of a text that is not empty.
func LastLine(text string) string {
	lines := strings.Split(strings.TrimSpace(text), "\n")
	return lines[len(lines)-1]
}

// Bounded keeps the first few kilobytes of what is written.
type Bounded struct {
	mu   sync.Mutex
	text strings.Builder
}

func (b *Bounded) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if room := ConsoleTail - b.text.Len(); room > 0 {
		b.text.Write(p[:min(room, len(p))])
	}
	return len(p), nil
}

func (b *Bounded) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.text.String()
}
