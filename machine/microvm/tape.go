package microvm

import (
	"io"
	"sync"
)

const tapeMost = 16 << 10 // bytes kept

// Tape keeps the end of what a guest's console prints. The zero value is empty.
type Tape struct {
	mu   sync.Mutex
	text []byte
}

// Record reads until the source ends. Whoever prints is never kept waiting for long.
func (t *Tape) Record(from io.Reader) {
	buffer := make([]byte, 4096)
	for {
		n, err := from.Read(buffer)
		t.mu.Lock()
		t.text = append(t.text, buffer[:n]...)
		if over := len(t.text) - tapeMost; over > 0 {
			t.text = append(t.text[:0], t.text[over:]...)
		}
		t.mu.Unlock()
		if err != nil {
			return
		}
	}
}

func (t *Tape) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return string(t.text)
}
