package authority

import (
	"crypto/ed25519"
	"errors"
	"path/filepath"
	"strings"
	"testing"

	"cal/approval/client"
	"cal/audit"
	"cal/audit/witness"
	"cal/nucleus"
)

const witnessedOrigin = "cal.test/log"

func witnessedLog(t *testing.T, key ed25519.PrivateKey, n int, word string) *audit.Log {
	t.Helper()
	l, err := audit.Open(filepath.Join(t.TempDir(), "log"), audit.Options{Origin: witnessedOrigin, Key: key})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	lengthen(t, l, n, word)
	return l
}

func lengthen(t *testing.T, l *audit.Log, n int, word string) {
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

// The authority cosigns a log's checkpoints while they continue one another, across a
// restart too, and records it when the log's key signs another history.
func TestBuiltInWitness(t *testing.T) {
	b := newBench(t, nil)
	_, key, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	vkey := audit.VerifierKey(witnessedOrigin, key.Public().(ed25519.PublicKey))
	info, err := b.client.Info(t.Context())
	if err != nil || audit.CheckWitnessKey(info.Witness) != nil {
		t.Fatalf("%+v, %v", info, err)
	}
	asks := func() *witness.Client {
		return &witness.Client{URL: client.WitnessURL, Key: info.Witness, HTTP: b.client.HTTP()}
	}
	l := witnessedLog(t, key, 5, "true")
	if _, err := asks().Cosign(t.Context(), l, l.Published(), vkey); !errors.Is(err, witness.ErrUnknownLog) {
		t.Fatalf("a log that nobody registered: %v", err)
	}
	if err := b.client.RegisterLog(t.Context(), vkey); err != nil {
		t.Fatal(err)
	}
	cosign := func(l *audit.Log) error {
		line, err := asks().Cosign(t.Context(), l, l.Published(), vkey)
		if err != nil {
			return err
		}
		cosigned, err := audit.AddCosignature(l.Published(), line, info.Witness)
		if err != nil {
			return err
		}
		kept, err := b.client.Witnessed(t.Context(), witnessedOrigin)
		if err == nil && (kept.Checkpoint != string(cosigned) || kept.Key != vkey || kept.Witness != info.Witness) {
			err = errors.New("what is kept is not what was cosigned")
		}
		return err
	}
	if err := cosign(l); err != nil {
		t.Fatal(err)
	}
	b.stop()
	b = startBench(t, b.c, b.cfg)
	lengthen(t, l, 300, "true")
	if err := cosign(l); err != nil {
		t.Fatal("after a restart: ", err)
	}
	before, _ := b.client.Witnessed(t.Context(), witnessedOrigin)
	for name, c := range map[string]struct {
		log  *audit.Log
		want error
	}{"cut back": {witnessedLog(t, key, 5, "true"), witness.ErrAhead}, "rewritten": {witnessedLog(t, key, 400, "false"), witness.ErrFork}} {
		if err := cosign(c.log); !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", name, err, c.want)
		}
	}
	if now, _ := b.client.Witnessed(t.Context(), witnessedOrigin); now != before {
		t.Errorf("a refusal changed what is kept: %+v", now)
	}
	other := audit.VerifierKey(witnessedOrigin, b.Approvers()[0].Key)
	wantKind(t, "another key for the log", b.client.RegisterLog(t.Context(), other), nucleus.KindConflict, "--forget")
	wantKind(t, "no key", b.client.RegisterLog(t.Context(), "x"), nucleus.KindInvalid, "verifier key")
	// A person may say that the log was begun anew.
	if err := b.client.ForgetLog(t.Context(), witnessedOrigin); err != nil {
		t.Fatal(err)
	}
	_, err = b.client.Witnessed(t.Context(), witnessedOrigin)
	wantKind(t, "forgotten", err, nucleus.KindNotFound, witnessedOrigin)
	wantKind(t, "forgotten again", b.client.ForgetLog(t.Context(), witnessedOrigin), nucleus.KindNotFound, witnessedOrigin)
	if err := b.client.RegisterLog(t.Context(), other); err != nil {
		t.Error(err)
	}
	if got := strings.Join(recorded(t, b.cfg.Dir), " "); got != "log.fork log.forget" {
		t.Errorf("recorded %q", got)
	}
}
