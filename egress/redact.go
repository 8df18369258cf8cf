package egress

import (
	"bytes"
	"io"
	"strings"
)

const (
	redacted = "[redacted]"

	// A shorter key is a placeholder of a server that wants none; striking it
	// out would only destroy answers.
	minSecret = 8
)

// secret is the key, where it is one.
func (route *Route) secret() []byte {
	if len(route.key) < minSecret {
		return nil
	}
	return []byte(route.key)
}

func (route *Route) redact(s string) string {
	if len(route.key) < minSecret {
		return s
	}
	return strings.ReplaceAll(s, route.key, redacted)
}

// redactor strikes key out of a stream, also where it is cut between two
// writes. It holds back only bytes that may be the key's beginning.
type redactor struct {
	to   io.Writer
	key  []byte // none: everything passes
	held []byte
}

func (r *redactor) Write(p []byte) (int, error) {
	if len(r.key) == 0 {
		return r.to.Write(p)
	}
	data := append(r.held, p...)
	data = bytes.ReplaceAll(data, r.key, []byte(redacted))
	keep := beginning(data, r.key)
	r.held = bytes.Clone(data[len(data)-keep:])
	if _, err := r.to.Write(data[:len(data)-keep]); err != nil {
		return 0, err
	}
	return len(p), nil
}

func (r *redactor) finish() error {
	_, err := r.to.Write(r.held)
	r.held = nil
	return err
}

// beginning returns the length of the longest end of data with which key
// begins, less than the whole key.
func beginning(data, key []byte) int {
	for n := min(len(key)-1, len(data)); n > 0; n-- {
		if bytes.HasSuffix(data, key[:n]) {
			return n
		}
	}
	return 0
}
