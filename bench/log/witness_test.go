package main

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"errors"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"testing"
	"time"

	f_note "github.com/transparency-dev/formats/note"
	"github.com/transparency-dev/tessera"
	"github.com/transparency-dev/tessera/storage/posix"
	"github.com/transparency-dev/witness/config"
	"github.com/transparency-dev/witness/persistence/inmemory"
	theirs "github.com/transparency-dev/witness/witness"
	"golang.org/x/mod/sumdb/note"

	"cal/audit"
	"cal/audit/witness"
	"cal/nucleus"
)

// theirWitness serves tlog-witness as transparency-dev/witness does.
func theirWitness(t *testing.T) *witness.Client {
	t.Helper()
	secret, public, err := note.GenerateKey(rand.Reader, "witness.example")
	if err != nil {
		t.Fatal(err)
	}
	signer, err := f_note.NewSignerForCosignatureV1(secret)
	if err != nil {
		t.Fatal(err)
	}
	store := inmemory.New()
	log := config.Log{Origin: origin, VKey: vkey()}
	if log.Verifier, err = f_note.NewVerifier(vkey()); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(store.Init(t.Context()), store.AddLogs(t.Context(), []config.Log{log})); err != nil {
		t.Fatal(err)
	}
	w, err := theirs.New(t.Context(), theirs.Opts{Persistence: store, Signers: []note.Signer{signer}, VerifierForLog: func(_ context.Context, o string) (note.Verifier, bool, error) {
		return log.Verifier, o == origin, nil
	}})
	if err != nil {
		t.Fatal(err)
	}
	mux := http.NewServeMux()
	mux.HandleFunc("POST /add-checkpoint", theirs.NewHTTPHandler(w).AddCheckpoint)
	server := httptest.NewServer(mux)
	t.Cleanup(server.Close)
	cosigns, err := f_note.VKeyToCosignatureV1(public)
	if err != nil {
		t.Fatal(err)
	}
	return &witness.Client{URL: server.URL, Key: cosigns, HTTP: server.Client()}
}

func openLog(t *testing.T, n int, word string) *audit.Log {
	t.Helper()
	l, err := audit.Open(filepath.Join(t.TempDir(), "log"), audit.Options{Origin: origin, Key: key})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	grow(t, l, n, word)
	return l
}

func grow(t *testing.T, l *audit.Log, n int, word string) {
	t.Helper()
	for range n {
		if _, err := l.Append(nucleus.Entry{Kind: "log.x", Session: word}); err != nil {
			t.Fatal(err)
		}
	}
	if err := l.Publish(); err != nil {
		t.Fatal(err)
	}
}

// A witness of others cosigns our log as it grows, and refuses it cut back or forked.
// A client that has forgotten what it asked for learns it from the conflict.
func TestTheirWitness(t *testing.T) {
	c := theirWitness(t)
	dir := filepath.Join(t.TempDir(), "log")
	l, err := audit.Open(dir, audit.Options{Origin: origin, Key: key})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	for i, n := range []int{1, 2, 253, 1, 0, 5, 300} {
		grow(t, l, n, "x")
		if i%2 == 1 {
			c = &witness.Client{URL: c.URL, Key: c.Key, HTTP: c.HTTP}
		}
		line, err := c.Cosign(t.Context(), l, l.Published(), vkey())
		if err != nil {
			t.Fatalf("step %d: %v", i, err)
		}
		cosigned, err := audit.AddCosignature(l.Published(), line, c.Key)
		if err != nil {
			t.Fatalf("step %d: %v", i, err)
		}
		if err := l.Keep(cosigned); err != nil {
			t.Fatalf("step %d: %v", i, err)
		}
		// Their verifier agrees with ours.
		v, err := f_note.NewVerifierForCosignatureV1(c.Key)
		if err != nil {
			t.Fatal(err)
		}
		if n, err := note.Open(cosigned, note.VerifierList(v)); err != nil || len(n.Sigs) != 1 {
			t.Fatalf("step %d: %v", i, err)
		}
	}
	r, err := audit.Verify(dir, audit.VerifyOptions{Key: vkey(), Witnesses: []string{c.Key}})
	if err != nil || !r.OK() || r.Cosigned != 562 || len(r.Cosignatures) != 1 || time.Since(time.Unix(r.Cosignatures[0].Unix, 0)) > time.Hour {
		t.Fatalf("%+v, %v", r, err)
	}
	if err := check(t.Context(), dir, vkey(), 2); err != nil { // with cosignatures on the checkpoint
		t.Fatal(err)
	}
	short, other := openLog(t, 500, "x"), openLog(t, 600, "y")
	for name, bad := range map[string]struct {
		log  *audit.Log
		want error
	}{"cut back": {short, witness.ErrAhead}, "forked": {other, witness.ErrFork}} {
		forgetful := &witness.Client{URL: c.URL, Key: c.Key, HTTP: c.HTTP}
		if _, err := forgetful.Cosign(t.Context(), bad.log, bad.log.Published(), vkey()); !errors.Is(err, bad.want) {
			t.Errorf("%s: %v, want %v", name, err, bad.want)
		}
	}
}

// ourStore knows one log.
type ourStore struct {
	key  string
	kept []byte
}

func (s *ourStore) Log(string) (string, []byte, error) { return s.key, s.kept, nil }
func (s *ourStore) Keep(_ string, signed []byte) error { s.kept = signed; return nil }

// A log of tessera's is cosigned by our witness, and publishes nothing without it.
func TestOurWitness(t *testing.T) {
	secret, public, err := note.GenerateKey(rand.Reader, "tessera.example/log")
	if err != nil {
		t.Fatal(err)
	}
	signer, err := note.NewSigner(secret)
	if err != nil {
		t.Fatal(err)
	}
	_, ourKey, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	store := &ourStore{key: public}
	ours := &witness.Witness{Name: "ours.example", Key: ourKey, Store: store}
	mux := http.NewServeMux()
	mux.Handle("POST /w/add-checkpoint", ours)
	server := httptest.NewServer(mux)
	defer server.Close()
	group, err := tessera.NewWitnessGroupFromPolicy([]byte("witness w " + ours.PublicKey() + " " + server.URL + "/w\nquorum w\n"))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	driver, err := posix.New(ctx, posix.Config{Path: filepath.Join(t.TempDir(), "log")})
	if err != nil {
		t.Fatal(err)
	}
	options := tessera.NewAppendOptions().WithCheckpointSigner(signer).WithBatching(10, time.Millisecond).
		WithCheckpointInterval(100*time.Millisecond).WithWitnesses(group, &tessera.WitnessOptions{})
	appender, shutdown, reader, err := tessera.NewAppender(ctx, driver, options)
	if err != nil {
		t.Fatal(err)
	}
	published := tessera.NewPublicationAwaiter(ctx, reader.ReadCheckpoint, 20*time.Millisecond)
	for _, n := range []int{1, 3, 300} {
		var last tessera.IndexFuture
		for range n {
			last = appender.Add(ctx, tessera.NewEntry([]byte("an entry")))
		}
		_, signed, err := published.Await(ctx, last)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := audit.Cosignatures(signed, ours.PublicKey()); err != nil {
			t.Errorf("%d more: %v\n%s", n, err, signed)
		}
	}
	if err := shutdown(ctx); err != nil {
		t.Fatal(err)
	}
	if !bytes.Contains(store.kept, []byte("— ours.example ")) {
		t.Errorf("kept: %s", store.kept)
	}
}
