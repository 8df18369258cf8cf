package firecracker

import (
	"os"
	"sync"
)

const consoleMost = 16 << 10 // bytes kept

// tape keeps the end of what came through a pipe.
type tape struct {
	pipe *os.File
	mu   sync.Mutex
	text []byte
}

// record reads until the pipe is closed.
func (t *tape) record() {
	buffer := make([]byte, 4096)
	for {
		n, err := t.pipe.Read(buffer)
		t.mu.Lock()
		t.text = append(t.text, buffer[:n]...)
		if over := len(t.text) - consoleMost; over > 0 {
			t.text = append(t.text[:0], t.text[over:]...)
		}
		t.mu.Unlock()
		if err != nil {
			return
		}
	}
}

func (t *tape) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return string(t.text)
}
