package e2e

import (
	"crypto/ed25519"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"cal/audit/witness"
	"cal/internal/testenv"
)

// elsewhere is a witness on another host, as far as the node can tell.
type elsewhere struct {
	mu   sync.Mutex
	key  string // of the log; empty: it does not know it
	kept []byte
}

func (e *elsewhere) Log(string) (string, []byte, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.key == "" {
		return "", nil, witness.ErrUnknownLog
	}
	return e.key, e.kept, nil
}

func (e *elsewhere) Keep(_ string, signed []byte) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.kept = signed
	return nil
}

// A person requires a witness: nothing is done until it knows the log. Its word stands
// in the log's directory. A log put back to what it was is found out by the authority's
// checkpoint, which nobody had to copy.
func TestWitnesses(t *testing.T) {
	e := testenv.New(t)
	e.Approver()
	_, key, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	store := &elsewhere{}
	w := &witness.Witness{Name: "elsewhere.test", Key: key, Store: store}
	mux := http.NewServeMux()
	mux.Handle("POST /w/add-checkpoint", w)
	server := httptest.NewServer(mux)
	defer server.Close()
	e.Write(filepath.Join(e.CAL, "config.yaml"), "log: {witness: []}\n")
	e.Cal("run", "--", "true").Want(t, 1, "config.yaml", "line 1: field witness not found")
	e.Write(filepath.Join(e.CAL, "config.yaml"), fmt.Sprintf("log:\n  witnesses:\n  - {url: %q, key: %q}\n", server.URL+"/w", w.PublicKey()))
	e.Cal("run", "--", "sh", "-c", "echo it ran").Want(t, 1, "nothing was done", "a witness that is required has not cosigned it", "unknown log")
	logKey := strings.TrimSpace(e.Cal("audit", "key").Want(t, 0).Stdout)
	store.mu.Lock()
	store.key = logKey
	store.mu.Unlock()
	testenv.Eventually(t, 20*time.Second, "the witness is asked again", func() bool {
		store.mu.Lock()
		defer store.mu.Unlock()
		return store.kept != nil
	})
	e.Cal("run", "--", "sh", "-c", "echo it ran").Want(t, 0, "it ran")
	e.Cal("audit", "verify", filepath.Join(e.CAL, "log"), "--key", logKey, "--witness", w.PublicKey()).Want(t, 0, "elsewhere.test cosigned")

	// The authority is shown the log at the node's start. A later state, and back again.
	e.Cal("node", "stop").Want(t, 0)
	early := filepath.Join(e.Dir, "early")
	if err := os.CopyFS(early, os.DirFS(filepath.Join(e.CAL, "log"))); err != nil {
		t.Fatal(err)
	}
	e.Cal("run", "--", "true").Want(t, 0)
	e.Cal("node", "stop").Want(t, 0)
	e.Cal("run", "--", "true").Want(t, 0)
	e.Cal("audit", "verify").Want(t, 0, "all as they were written", "that was kept elsewhere")
	e.Cal("node", "stop").Want(t, 0)
	if err := os.RemoveAll(filepath.Join(e.CAL, "log")); err != nil {
		t.Fatal(err)
	}
	if err := os.CopyFS(filepath.Join(e.CAL, "log"), os.DirFS(early)); err != nil {
		t.Fatal(err)
	}
	e.Cal("audit", "verify", filepath.Join(e.CAL, "log"), "--key", logKey).Want(t, 0, "all as they were written") // the control: a log by itself
	e.Cal("audit", "verify").Want(t, 1, "truncated", "kept elsewhere")
	// And the node does nothing on it: the witness has seen more.
	e.Cal("run", "--", "sh", "-c", "echo it ran").Want(t, 1, "nothing was done", "behind what was cosigned")
}
