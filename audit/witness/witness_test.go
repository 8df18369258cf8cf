package witness

import (
	"bytes"
	"crypto/ed25519"
	"encoding/base64"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"testing"
	"time"
	"unicode"

	"golang.org/x/mod/sumdb/tlog"

	"cal/audit"
	"cal/nucleus"
)

const origin = "cal.test/log"

func key(n byte) ed25519.PrivateKey { return ed25519.NewKeyFromSeed(bytes.Repeat([]byte{n}, 32)) }

var logKey = audit.VerifierKey(origin, key(1).Public().(ed25519.PublicKey))

// memory is a store that a test can break.
type memory struct {
	keys map[string]string
	kept map[string][]byte
	fail error
}

func (m *memory) Log(origin string) (string, []byte, error) {
	key, ok := m.keys[origin]
	if !ok {
		return "", nil, ErrUnknownLog
	}
	return key, m.kept[origin], nil
}

func (m *memory) Keep(origin string, signed []byte) error {
	if m.fail == nil {
		m.kept[origin] = signed
	}
	return m.fail
}

func newWitness() (*Witness, *memory) {
	m := &memory{keys: map[string]string{origin: logKey}, kept: map[string][]byte{}}
	return &Witness{Name: "w.test", Key: key(2), Store: m, Now: func() time.Time { return time.Unix(1700000000, 0) }}, m
}

func openLog(t *testing.T, k ed25519.PrivateKey) *audit.Log {
	t.Helper()
	l, err := audit.Open(filepath.Join(t.TempDir(), "log"), audit.Options{Origin: origin, Key: k})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

// grow appends n entries that hold the word, and publishes.
func grow(t *testing.T, l *audit.Log, n int, word string) []byte {
	t.Helper()
	for range n {
		if _, err := l.Append(nucleus.Entry{Kind: "log.x", Session: word}); err != nil {
			t.Fatal(err)
		}
	}
	if err := l.Publish(); err != nil {
		t.Fatal(err)
	}
	return l.Published()
}

func serve(t *testing.T, h http.Handler) *Client {
	t.Helper()
	mux := http.NewServeMux()
	mux.Handle("POST /some/prefix/add-checkpoint", h)
	server := httptest.NewServer(mux)
	t.Cleanup(server.Close)
	return &Client{URL: server.URL + "/some/prefix", Key: audit.WitnessKey("w.test", key(2).Public().(ed25519.PublicKey)), HTTP: server.Client()}
}

// A log grows beside its witness: each checkpoint is cosigned and kept, by one client
// and by one that remembers nothing.
func TestCosign(t *testing.T) {
	w, m := newWitness()
	c := serve(t, w)
	l := openLog(t, key(1))
	for i, n := range []int{0, 1, 0, 254, 1, 1, 300, 7} {
		signed := grow(t, l, n, "x")
		if i%3 == 2 {
			c = serve(t, w)
		}
		line, err := c.Cosign(t.Context(), l, signed, logKey)
		if err != nil {
			t.Fatalf("step %d: %v", i, err)
		}
		cosigned, err := audit.AddCosignature(signed, line, c.Key)
		if err != nil || !bytes.Equal(cosigned, m.kept[origin]) {
			t.Fatalf("step %d: kept %q, want %q (%v)", i, m.kept[origin], cosigned, err)
		}
		said, err := audit.Cosignatures(cosigned, c.Key)
		if err != nil || len(said) != 1 || said[0] != (audit.Witnessed{Name: "w.test", Unix: 1700000000}) {
			t.Fatalf("step %d: %v, %v", i, said, err)
		}
		if err := l.Keep(cosigned); err != nil {
			t.Fatalf("step %d: %v", i, err)
		}
	}
}

// What a witness must refuse, with the status that C2SP wants, and keep nothing.
func TestRefusals(t *testing.T) {
	ours, fork, foreign := openLog(t, key(1)), openLog(t, key(1)), openLog(t, key(3))
	three := grow(t, ours, 3, "ours")
	five := grow(t, ours, 2, "ours")
	eight := grow(t, ours, 3, "ours")
	otherFive, otherEight := grow(t, fork, 5, "forged"), grow(t, fork, 3, "forged")
	foreignSix := grow(t, foreign, 6, "ours")
	proof := func(l *audit.Log, from, to int64) string {
		hashes, err := l.Consistency(from, to)
		if err != nil {
			t.Fatal(err)
		}
		return strings.Trim(string(request{proof: hashes}.bytes()), "\n")[len("old 0"):]
	}
	renamed := strings.Replace(string(eight), origin, "cal.test/other", 1)
	cases := []struct {
		name, old, proof string
		signed           []byte
		want             error
		code             int
	}{
		{"a fork of the same size", "old 5", "", otherFive, errOtherRoot, 409},
		{"a fork that grew, its own proof", "old 5", proof(fork, 5, 8), otherEight, errProof, 422},
		{"a fork that grew, our proof", "old 5", proof(ours, 5, 8), otherEight, errProof, 422},
		{"ours without a proof", "old 5", "", eight, errProof, 422},
		{"ours with a proof from another size", "old 5", proof(ours, 3, 8), eight, errProof, 422},
		{"the same again with a proof", "old 5", proof(ours, 3, 5), five, errProof, 422},
		{"an old size that is not kept", "old 3", proof(ours, 3, 8), eight, Stale(5), 409},
		{"from nothing", "old 0", "", eight, Stale(5), 409},
		{"a log cut back", "old 3", "", three, Stale(5), 409},
		{"old beyond the checkpoint", "old 5", "", three, ErrMalformed, 400},
		{"another key", "old 5", "", foreignSix, ErrSignature, 403},
		{"another log", "old 5", "", []byte(renamed), ErrUnknownLog, 404},
		{"no signature", "old 5", "", eight[:bytes.Index(eight, []byte("\n\n"))+1], ErrSignature, 403},
		{"a negative size", "old -1", "", eight, ErrMalformed, 400},
		{"a padded size", "old 05", "", eight, ErrMalformed, 400},
		{"no size", "5", "", eight, ErrMalformed, 400},
		{"a hash too short", "old 5", "\nAAAA", eight, ErrMalformed, 400},
		{"64 hashes", "old 5", strings.Repeat("\n"+base64.StdEncoding.EncodeToString(make([]byte, 32)), 64), eight, ErrMalformed, 400},
	}
	w, m := newWitness()
	told := 0
	w.Refused = func(o string, kept, signed []byte, why error) {
		told++
		if o != origin || !errors.Is(why, ErrFork) || kept == nil || signed == nil {
			t.Errorf("told of %q: %v", o, why)
		}
	}
	if _, err := w.Add(request{0, nil, five}.bytes()); err != nil {
		t.Fatal(err)
	}
	before := maps.Clone(m.kept)
	forks := 0
	for _, c := range cases {
		body := []byte(c.old + c.proof + "\n\n" + string(c.signed))
		line, err := w.Add(body)
		if !errors.Is(err, c.want) || line != nil {
			t.Errorf("%s: %q, %v, want %v", c.name, line, err, c.want)
		}
		if errors.Is(err, ErrFork) {
			forks++
		}
		rec := httptest.NewRecorder()
		w.ServeHTTP(rec, httptest.NewRequest("POST", "/add-checkpoint", bytes.NewReader(body)))
		if rec.Code != c.code {
			t.Errorf("%s: status %d, want %d", c.name, rec.Code, c.code)
		}
		if stale := (Stale(0)); errors.As(c.want, &stale) && (rec.Body.String() != "5\n" || rec.Header().Get("Content-Type") != sizeType) {
			t.Errorf("%s: %q of type %q", c.name, rec.Body, rec.Header().Get("Content-Type"))
		}
	}
	for name, body := range map[string][]byte{"nothing": {}, "noise": []byte("\n\n\n"), "large": make([]byte, maxRequest+1)} {
		rec := httptest.NewRecorder()
		w.ServeHTTP(rec, httptest.NewRequest("POST", "/add-checkpoint", bytes.NewReader(body)))
		if rec.Code != 400 {
			t.Errorf("%s: status %d", name, rec.Code)
		}
	}
	if told != 2*forks || forks == 0 { // once by Add, once by HTTP
		t.Errorf("told of %d forks, want %d", told, 2*forks)
	}
	if !maps.EqualFunc(before, m.kept, bytes.Equal) {
		t.Error("a refusal changed what is kept")
	}
	// The control: the true continuation passes after all that.
	hashes, err := ours.Consistency(5, 8)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Add(request{5, hashes, eight}.bytes()); err != nil {
		t.Errorf("the true continuation: %v", err)
	}
}

// What cannot be kept is not cosigned.
func TestNotKept(t *testing.T) {
	w, m := newWitness()
	signed := grow(t, openLog(t, key(1)), 3, "x")
	m.fail = errors.New("disk full")
	if line, err := w.Add(request{0, nil, signed}.bytes()); line != nil || !errors.Is(err, m.fail) {
		t.Errorf("%q, %v", line, err)
	}
	m.fail = nil
	if _, err := w.Add(request{0, nil, signed}.bytes()); err != nil {
		t.Error(err)
	}
}

// The client tells a log that was cut back or forked from one that is unknown, and
// believes no answer that the witness's key has not signed.
func TestClient(t *testing.T) {
	w, _ := newWitness()
	l := openLog(t, key(1))
	grow(t, l, 300, "x")
	if _, err := serve(t, w).Cosign(t.Context(), l, l.Published(), logKey); err != nil {
		t.Fatal(err)
	}
	short, other := openLog(t, key(1)), openLog(t, key(1))
	grow(t, short, 200, "x")
	grow(t, other, 301, "y")
	stranger := openLog(t, key(3))
	grow(t, stranger, 400, "x")
	for name, c := range map[string]struct {
		log  *audit.Log
		key  string
		want error
	}{
		"cut back": {short, logKey, ErrAhead}, "forked": {other, logKey, ErrFork},
		"another key": {stranger, audit.VerifierKey(origin, key(3).Public().(ed25519.PublicKey)), ErrSignature},
	} {
		if line, err := serve(t, w).Cosign(t.Context(), c.log, c.log.Published(), c.key); !errors.Is(err, c.want) || line != nil {
			t.Errorf("%s: %q, %v, want %v", name, line, err, c.want)
		}
	}
	otherWitness := &Witness{Name: "w.test", Key: key(9), Store: w.Store}
	good, err := audit.Cosign(l.Published(), "w.test", key(2), time.Unix(1700000000, 0))
	if err != nil {
		t.Fatal(err)
	}
	late := grow(t, l, 1, "x")
	for name, h := range map[string]http.HandlerFunc{
		"another key of that name": func(rw http.ResponseWriter, r *http.Request) {
			line, err := audit.Cosign(late, "w.test", otherWitness.Key, time.Now())
			if err != nil {
				t.Error(err)
			}
			rw.Write(line)
		},
		"a cosignature of an older checkpoint": func(rw http.ResponseWriter, r *http.Request) { rw.Write(good) },
		"nothing":                              func(rw http.ResponseWriter, r *http.Request) {},
		"noise":                                func(rw http.ResponseWriter, r *http.Request) { rw.Write([]byte("— w.test AAAA\n\n\x00")) },
		"a page":                               func(rw http.ResponseWriter, r *http.Request) { http.Error(rw, "hello", http.StatusTeapot) },
		"a conflict that goes on for ever":     conflicts(1, 2, 3, 4, 5, 6),
		"a conflict without a size":            conflicts(0),
		"a conflict of a negative size":        conflicts(-1),
		"a page that speaks to the terminal": func(rw http.ResponseWriter, r *http.Request) {
			http.Error(rw, strings.Repeat("\x1b]0;PWNED\a\u202e", 500), http.StatusTeapot)
		},
		"too much": func(rw http.ResponseWriter, r *http.Request) {
			rw.Write(bytes.Repeat([]byte("x"), 10<<20))
		},
	} {
		if line, err := serve(t, h).Cosign(t.Context(), l, late, logKey); err == nil || line != nil || errors.Is(err, ErrFork) || errors.Is(err, ErrAhead) {
			t.Errorf("%s: %q, %v", name, line, err)
		} else if text := err.Error(); len(text) > 3000 || strings.ContainsFunc(text, func(r rune) bool { return !unicode.IsPrint(r) }) {
			t.Errorf("%s: %d bytes: %.300q", name, len(text), text)
		}
	}
	gone := serve(t, w)
	gone.URL = "http://127.0.0.1:1/w"
	if _, err := gone.Cosign(t.Context(), l, late, logKey); err == nil {
		t.Error("nobody is there, and it cosigned")
	}
	// The control.
	if _, err := serve(t, w).Cosign(t.Context(), l, late, logKey); err != nil {
		t.Error(err)
	}
}

func conflicts(sizes ...int) http.HandlerFunc {
	return func(rw http.ResponseWriter, r *http.Request) {
		size := sizes[0]
		if len(sizes) > 1 {
			sizes = sizes[1:]
		}
		rw.Header().Set("Content-Type", sizeType)
		rw.WriteHeader(http.StatusConflict)
		fmt.Fprintf(rw, "%d\n", size)
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte("old 0\n\no\n1\n"))
	f.Add(request{7, make([]tlog.Hash, 2), []byte("o\n")}.bytes())
	f.Fuzz(func(t *testing.T, body []byte) {
		r, err := parse(body)
		if err == nil && !bytes.Equal(r.bytes(), body) {
			t.Errorf("%q is read as %q", body, r.bytes())
		}
	})
}
