package witness

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/mod/sumdb/tlog"

	"cal/audit"
)

// askTimeout is how long one request to a witness may take.
const askTimeout = 10 * time.Second

// Log is what a client needs of a log.
type Log interface {
	// Consistency proves that the tree of old entries is the beginning of that of size.
	Consistency(old, size int64) ([]tlog.Hash, error)
}

// Client asks one witness. Its methods may be called at the same time.
type Client struct {
	URL  string       // the submission prefix: /add-checkpoint follows
	Key  string       // of the witness; what it answers is checked against it
	HTTP *http.Client // nil: http.DefaultClient

	mu   sync.Mutex
	last int64 // size that the witness has cosigned last, as far as is known
}

// ErrAhead says that the witness has cosigned more entries than the log has: it was
// cut back, or another log has its key.
var ErrAhead = errors.New("the log is behind what was cosigned")

// Cosign asks for a cosignature of a signed checkpoint of the log and returns its
// line, verified. ErrFork and ErrAhead say that this log is not the one that the
// witness knows; ErrUnknownLog and ErrSignature that it does not know the log or its
// key; any other error that there is no answer to rely on.
func (c *Client) Cosign(ctx context.Context, log Log, signed []byte, logKey string) ([]byte, error) {
	cp, err := audit.ParseCheckpoint(signed, logKey)
	if err != nil {
		return nil, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for range 3 { // others may ask for this log, too
		line, err := c.ask(ctx, log, signed, cp)
		var stale Stale
		if !errors.As(err, &stale) {
			return line, err
		}
		if int64(stale) > cp.Size {
			return nil, fmt.Errorf("%w: witness %s has cosigned %d entries, the log has %d", ErrAhead, c.name(), int64(stale), cp.Size)
		}
		c.last = int64(stale)
	}
	return nil, fmt.Errorf("witness %s: its size changed at each of three requests", c.name())
}

func (c *Client) name() string {
	name, _, _ := strings.Cut(c.Key, "+")
	return fmt.Sprintf("%s at %s", name, c.URL)
}

func (c *Client) ask(ctx context.Context, log Log, signed []byte, cp audit.Checkpoint) ([]byte, error) {
	if c.last > cp.Size { // an older checkpoint than was asked for before: let it say so
		return nil, Stale(c.last)
	}
	proof, err := log.Consistency(c.last, cp.Size)
	if err != nil {
		return nil, err
	}
	code, kind, answer, err := c.post(ctx, request{c.last, proof, signed}.bytes())
	if err != nil {
		return nil, fmt.Errorf("witness %s: %w", c.name(), err)
	}
	fail := func(err error) error {
		said := strings.TrimSpace(string(answer[:min(len(answer), 200)]))
		return fmt.Errorf("witness %s answers %d: %w: %s", c.name(), code, err, audit.Printable(said))
	}
	switch code {
	case http.StatusOK:
		return c.accept(signed, answer, cp.Size)
	case http.StatusConflict:
		if kind != sizeType {
			return nil, fail(errOtherRoot)
		}
		digits := strings.TrimSuffix(string(answer), "\n")
		size, err := strconv.ParseInt(digits, 10, 64)
		if err != nil || size < 0 || size == c.last {
			return nil, fail(errors.New("a conflict without another size"))
		}
		return nil, Stale(size)
	case http.StatusUnprocessableEntity:
		return nil, fail(errProof)
	case http.StatusNotFound:
		return nil, fail(ErrUnknownLog)
	case http.StatusForbidden:
		return nil, fail(ErrSignature)
	}
	return nil, fail(errors.New("no cosignature"))
}

// accept looks for the witness's line among those that it sent.
func (c *Client) accept(signed, answer []byte, size int64) ([]byte, error) {
	for line := range bytes.Lines(answer) {
		if _, err := audit.AddCosignature(signed, line, c.Key); err == nil {
			c.last = size
			return line, nil
		}
	}
	return nil, fmt.Errorf("witness %s answers %.200q, in which no cosignature holds by its key", c.name(), answer)
}

func (c *Client) post(ctx context.Context, body []byte) (code int, kind string, answer []byte, err error) {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, strings.TrimSuffix(c.URL, "/")+"/add-checkpoint", bytes.NewReader(body))
	if err != nil {
		return 0, "", nil, err
	}
	client := c.HTTP
	if client == nil {
		client = http.DefaultClient
	}
	response, err := client.Do(r)
	if err != nil {
		return 0, "", nil, err
	}
	defer response.Body.Close()
	answer, err = io.ReadAll(io.LimitReader(response.Body, maxRequest))
	return response.StatusCode, response.Header.Get("Content-Type"), answer, err
}
