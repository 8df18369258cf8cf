package audit

import (
	"bytes"
	"compress/gzip"
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/mod/sumdb/tlog"
	"pgregory.net/rapid"

	"cal/nucleus"
)

var machineKey = newKey(7)

// callEntries are the entries of one call of a session, as a node writes them.
func callEntries(t testing.TB, session string, n int) []nucleus.Entry {
	t.Helper()
	permit := nucleus.NewID("r-")
	action := nucleus.Action{Op: nucleus.EditFiles, Args: nucleus.SHA256([]byte(permit)), Files: []nucleus.File{{
		Path: fmt.Sprintf("app/src/file%d.go", n%40), Before: nucleus.SHA256([]byte{byte(n)}), After: nucleus.SHA256([]byte(permit + "x")),
	}}}
	digest, err := action.Digest(nucleus.NewSalt())
	if err != nil {
		t.Fatal(err)
	}
	args, _ := json.Marshal(action)
	e := nucleus.Entry{Pod: "p-" + session, Session: session, Actor: "b-1", Op: action.Op, Digest: digest, Permit: permit}
	intent, outcome := e, e
	intent.Kind, intent.Args, intent.Verdict, intent.Rule, intent.Exposure = nucleus.KindIntent, args, nucleus.Allow, "operations.edit_files", []string{"private"}
	signed, err := nucleus.Sign(machineKey, nucleus.DomainOutcome, nucleus.Outcome{
		Permit: permit, Pod: e.Pod, Boot: "b-" + session, Seq: uint64(n), Status: nucleus.OutcomeDone, Result: nucleus.SHA256([]byte(permit)), Millis: 3})
	if err != nil {
		t.Fatal(err)
	}
	outcome.Kind, outcome.Outcome, outcome.Status = nucleus.KindOutcome, &signed, nucleus.OutcomeDone
	return []nucleus.Entry{intent, outcome}
}

func startEntry(session string) nucleus.Entry {
	data, _ := json.Marshal(map[string]any{"boot": "b-" + session, "outcome_key": []byte(machineKey.Public().(ed25519.PublicKey))})
	return nucleus.Entry{Pod: "p-" + session, Session: session, Actor: "operator", Kind: nucleus.KindPodStart, Data: data}
}

func appendAll(t testing.TB, l *Log, entries ...nucleus.Entry) {
	t.Helper()
	for _, e := range entries {
		if _, err := l.Append(e); err != nil {
			t.Fatal(err)
		}
	}
}

// makeSessions makes a log in which two sessions take turns at calls.
func makeSessions(t testing.TB, calls int) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "log")
	l := mustOpen(t, dir, testOptions())
	appendAll(t, l, startEntry("s-a"), startEntry("s-b"))
	for i := range calls {
		appendAll(t, l, append(callEntries(t, "s-a", i), callEntries(t, "s-b", i)...)...)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	return dir
}

func mustReceipt(t testing.TB, dir string, o ReceiptOptions) []byte {
	t.Helper()
	o.Key = testVerifier
	raw, err := NewReceipt(dir, o)
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

func wantRefused(t *testing.T, raw []byte, o VerifyReceiptOptions, kinds ...ProblemKind) {
	t.Helper()
	if o.Key == "" {
		o.Key = testVerifier
	}
	v, err := VerifyReceipt(raw, o)
	var refused *ReceiptError
	if !errors.As(err, &refused) || !slices.Contains(kinds, refused.Kind) {
		t.Errorf("accepted %v, %v; want a refusal of kind %v", v != nil, err, kinds)
	}
}

func TestReceipt(t *testing.T) {
	dir := makeSessions(t, 5)
	for _, text := range []bool{false, true} {
		v, err := VerifyReceipt(mustReceipt(t, dir, ReceiptOptions{Session: "s-b", Text: text}), VerifyReceiptOptions{Key: testVerifier})
		if err != nil {
			t.Fatal(err)
		}
		if len(v.Entries) != 11 || v.First != 1 || v.Last != 21 || v.Between != 10 || v.Size != 22 || v.Signed != 5 || v.Unchecked != 0 || len(v.Open) != 0 {
			t.Errorf("got %+v", v)
		}
		want := []string{}
		for raw, err := range Find(dir, 0, Filter{Session: "s-b"}) {
			if err != nil {
				t.Fatal(err)
			}
			want = append(want, string(raw))
		}
		for i, raw := range v.Entries {
			if string(raw) != want[i] {
				t.Errorf("entry %d: got %s, want %s", i, raw, want[i])
			}
		}
		if says := strings.Join(v.Says(), "\n"); !strings.Contains(says, "10 entries of the log lie between them and are not shown") || !strings.Contains(says, "does not prove that the session had no other entry") {
			t.Errorf("it says %s", says)
		}
	}
	if _, err := NewReceipt(dir, ReceiptOptions{Key: testVerifier, Session: "s-c"}); err == nil || !strings.Contains(err.Error(), "no entry of session s-c") {
		t.Errorf("of no session: %v", err)
	}
}

// What is not in the receipt stays unknown: of the entries beside it there are hashes
// alone.
func TestReceiptShowsNothingElse(t *testing.T) {
	dir := makeSessions(t, 5)
	raw := mustReceipt(t, dir, ReceiptOptions{Session: "s-b", Text: true})
	if bytes.Contains(raw, []byte("s-a")) {
		t.Errorf("it names the other session: %s", raw)
	}
	if !bytes.Contains(raw, []byte("app/src/file3.go")) { // the control
		t.Errorf("it does not show its own entries")
	}
}

// resum puts the digest and the lengths of a receipt right after somebody changed it.
func resum(t testing.TB, raw []byte) []byte {
	t.Helper()
	head, rest, ok := bytes.Cut(raw, []byte("\n\n"))
	at := bytes.LastIndex(head, []byte("sha256 "))
	if !ok || at < 0 {
		return raw
	}
	return fmt.Appendf(nil, "%ssha256 %x\n\n%s", head[:at], sha256.Sum256(rest), rest)
}

func parseReceipt(raw []byte) (*receipt, error) {
	s, err := openReceipt(raw)
	if err != nil {
		return nil, err
	}
	return s.read()
}

// edited makes a receipt of other parts, with everything put right that can be without
// the log's key.
func edited(t testing.TB, raw []byte, change func(r *receipt)) []byte {
	t.Helper()
	r, err := parseReceipt(raw)
	if err != nil {
		t.Fatal(err)
	}
	change(r)
	again, err := r.encode(true)
	if err != nil {
		t.Fatal(err)
	}
	return again
}

// rebody changes the bytes of a receipt's body and puts header and digest right.
func rebody(t testing.TB, raw []byte, change func(body []byte) []byte) []byte {
	t.Helper()
	head, rest, _ := bytes.Cut(raw, []byte("\n\n"))
	h, err := parseHeader(string(head) + "\n")
	if err != nil {
		t.Fatal(err)
	}
	body := change(bytes.Clone(rest[h.note:]))
	head = bytes.Replace(head, fmt.Appendf(nil, " %d\nsha256", h.body), fmt.Appendf(nil, " %d\nsha256", len(body)), 1)
	return resum(t, bytes.Join([][]byte{head, []byte("\n\n"), rest[:h.note], body}, nil))
}

func TestReceiptRefuses(t *testing.T) {
	dir, other := makeSessions(t, 5), makeSessions(t, 5)
	good := mustReceipt(t, dir, ReceiptOptions{Session: "s-b", Text: true})
	if _, err := VerifyReceipt(edited(t, good, func(*receipt) {}), VerifyReceiptOptions{Key: testVerifier}); err != nil {
		t.Fatalf("the control: %v", err)
	}
	foreign := mustReceipt(t, other, ReceiptOptions{Session: "s-b", Text: true})
	theirs, err := parseReceipt(foreign)
	if err != nil {
		t.Fatal(err)
	}
	elsewhere, err := parseReceipt(mustReceipt(t, dir, ReceiptOptions{Session: "s-a", Text: true}))
	if err != nil {
		t.Fatal(err)
	}
	remove := func(r *receipt, i int) {
		r.entries, r.indexes = slices.Delete(r.entries, i, i+1), slices.Delete(r.indexes, i, i+1)
	}
	for _, c := range []struct {
		name   string
		change func(r *receipt)
		kinds  []ProblemKind
	}{
		{"first entry dropped", func(r *receipt) { remove(r, 0) }, []ProblemKind{Missing, Changed, Extra}},
		{"entry dropped", func(r *receipt) { remove(r, 4) }, []ProblemKind{Missing, Changed, Extra}},
		{"last entry dropped", func(r *receipt) { remove(r, 10) }, []ProblemKind{Missing, Changed, Extra}},
		{"entry and a hash dropped", func(r *receipt) { remove(r, 4); r.hashes = r.hashes[1:] }, []ProblemKind{Missing, Changed, Extra}},
		{"entry of the session in another log added", func(r *receipt) {
			r.entries, r.indexes = append(r.entries, bytes.Replace(theirs.entries[10], []byte(`"seq":21`), []byte(`"seq":25`), 1)), append(r.indexes, 25)
		}, []ProblemKind{Extra}},
		{"entry of the other session added", func(r *receipt) {
			r.entries, r.indexes = slices.Insert(r.entries, 0, elsewhere.entries[0]), slices.Insert(r.indexes, 0, 0)
		}, []ProblemKind{Missing, Extra, Foreign, Changed}},
		{"entry twice", func(r *receipt) {
			r.entries, r.indexes = slices.Insert(r.entries, 3, r.entries[3]), slices.Insert(r.indexes, 3, r.indexes[3])
		}, []ProblemKind{Reordered}},
		{"two entries swapped", func(r *receipt) { r.entries[3], r.entries[4] = r.entries[4], r.entries[3] }, []ProblemKind{Reordered}},
		{"two entries swapped, renumbered", func(r *receipt) {
			a, b := r.entries[3], r.entries[5]
			r.entries[3] = bytes.Replace(b, fmt.Appendf(nil, `"seq":%d`, r.indexes[5]), fmt.Appendf(nil, `"seq":%d`, r.indexes[3]), 1)
			r.entries[5] = bytes.Replace(a, fmt.Appendf(nil, `"seq":%d`, r.indexes[3]), fmt.Appendf(nil, `"seq":%d`, r.indexes[5]), 1)
		}, []ProblemKind{Changed}},
		{"a word of an entry", func(r *receipt) {
			r.entries[1] = bytes.Replace(r.entries[1], []byte(`"allow"`), []byte(`"deny"`), 1)
		}, []ProblemKind{Changed}},
		{"two hashes swapped", func(r *receipt) { r.hashes[0], r.hashes[1] = r.hashes[1], r.hashes[0] }, []ProblemKind{Changed}},
		{"hash dropped", func(r *receipt) { r.hashes = r.hashes[1:] }, []ProblemKind{Missing}},
		{"hash added", func(r *receipt) { r.hashes = append(r.hashes, r.hashes[0]) }, []ProblemKind{Extra}},
		{"another log's checkpoint, same key and size", func(r *receipt) { r.note = theirs.note }, []ProblemKind{Changed}},
		{"no checkpoint", func(r *receipt) { r.note = nil }, []ProblemKind{Malformed}},
		{"another session's name", func(r *receipt) { r.session = "s-a" }, []ProblemKind{Foreign}},
		{"duplicate key", func(r *receipt) {
			r.entries[1] = bytes.Replace(r.entries[1], []byte(`{"actor"`), []byte(`{"actor":"operator","actor"`), 1)
		}, []ProblemKind{Malformed}},
		{"spaces in an entry", func(r *receipt) { r.entries[1] = bytes.Replace(r.entries[1], []byte(`,`), []byte(`, `), 1) }, []ProblemKind{Malformed}},
	} {
		t.Run(c.name, func(t *testing.T) { wantRefused(t, edited(t, good, c.change), VerifyReceiptOptions{}, c.kinds...) })
	}
	for _, c := range []struct {
		name   string
		change func(raw string) string
		kind   ProblemKind
	}{
		{"nothing", func(string) string { return "" }, Malformed},
		{"one more byte", func(s string) string { return s + "\n" }, Malformed},
		{"one byte less", func(s string) string { return s[:len(s)-1] }, Malformed},
		{"only the header", func(s string) string { return s[:strings.Index(s, "\n\n")+2] }, Malformed},
		{"another version", func(s string) string { return strings.Replace(s, "/v1", "/v2", 1) }, Malformed},
		{"claims to be the whole session", func(s string) string { return strings.Replace(s, "\nentries", "\ncomplete yes\nentries", 1) }, Malformed},
		{"session twice", func(s string) string { return strings.Replace(s, "\nentries", "\nsession s-b\nentries", 1) }, Malformed},
		{"CR LF", func(s string) string { return strings.Replace(s, "s-b\n", "s-b\r\n", 1) }, Malformed},
		{"two spaces", func(s string) string { return strings.Replace(s, "session s-b", "session  s-b", 1) }, Malformed},
		{"leading zero", func(s string) string { return strings.Replace(s, "entries 11", "entries 011", 1) }, Malformed},
		{"other count", func(s string) string { return strings.Replace(s, "entries 11", "entries 12", 1) }, Malformed},
		{"other range", func(s string) string { return strings.Replace(s, "from 1 to 21", "from 0 to 21", 1) }, Malformed},
		{"body of another form", func(s string) string { return strings.Replace(s, "body text", "body gzip", 1) }, Malformed},
		{"unknown form", func(s string) string { return strings.Replace(s, "body text", "body zip", 1) }, Malformed},
		{"digest in upper case", func(s string) string {
			at := strings.Index(s, "sha256 ") + 7
			return s[:at] + strings.ToUpper(s[at:at+64]) + s[at+64:]
		}, Malformed},
		{"huge lengths", func(s string) string {
			return strings.Replace(s, "checkpoint ", "checkpoint 9223372036854775", 1)
		}, Malformed},
		{"negative lengths", func(s string) string { return strings.Replace(s, "checkpoint ", "checkpoint -", 1) }, Malformed},
	} {
		t.Run(c.name, func(t *testing.T) { wantRefused(t, []byte(c.change(string(good))), VerifyReceiptOptions{}, c.kind) })
	}
	// Lengths and digest are put right; what is inside has another spelling.
	packed := mustReceipt(t, dir, ReceiptOptions{Session: "s-b"})
	for name, raw := range map[string][]byte{
		"bytes behind the packed body": rebody(t, packed, func(body []byte) []byte { return append(body, 0) }),
		"two packed bodies":            rebody(t, packed, func(body []byte) []byte { return append(body, body...) }),
		"a hash behind the entries": rebody(t, good, func(body []byte) []byte {
			first, rest, _ := bytes.Cut(body, []byte("\n"))
			return append(append(bytes.Clone(rest), first...), '\n')
		}),
		"a hash with a CR":     rebody(t, good, func(body []byte) []byte { return bytes.Replace(body, []byte("=\n"), []byte("=\r\n"), 1) }),
		"a line that is empty": rebody(t, good, func(body []byte) []byte { return append(body, '\n') }),
		"no last line feed":    rebody(t, good, func(body []byte) []byte { return body[:len(body)-1] }),
	} {
		t.Run(name, func(t *testing.T) { wantRefused(t, raw, VerifyReceiptOptions{}, Malformed) })
	}
	t.Run("another key", func(t *testing.T) {
		wantRefused(t, good, VerifyReceiptOptions{Key: VerifierKey(testOrigin, newKey(1).Public().(ed25519.PublicKey))}, BadSignature)
	})
	t.Run("another origin", func(t *testing.T) {
		wantRefused(t, good, VerifyReceiptOptions{Key: VerifierKey("other/log", testKey.Public().(ed25519.PublicKey))}, BadSignature)
	})
}

// Every bit of a small receipt matters, as it is and when the digest in its header, which
// protects from accidents alone, is put right.
func TestReceiptEveryBit(t *testing.T) {
	dir := makeSessions(t, 1)
	for _, form := range []bool{true, false} {
		good := mustReceipt(t, dir, ReceiptOptions{Session: "s-b", Text: form})
		accepted := 0
		for i := range good {
			for bit := range 8 {
				bad := bytes.Clone(good)
				bad[i] ^= 1 << bit
				variants := [][]byte{bad}
				if form { // a stream of gzip has bits that mean nothing; the digest covers them
					variants = append(variants, resum(t, bad))
				}
				for _, bad := range variants {
					if bytes.Equal(bad, good) { // the flip was in the digest
						accepted++
						continue
					}
					if _, err := VerifyReceipt(bad, VerifyReceiptOptions{Key: testVerifier}); err == nil {
						t.Fatalf("text %v: byte %d of %d, bit %d: %q was accepted", form, i, len(good), bit, bad[max(0, i-20):min(len(bad), i+20)])
					}
				}
			}
		}
		if form && accepted != 64*8 {
			t.Errorf("%d flips were put right, want those of 64 hex digits", accepted)
		}
	}
}

func TestProofOfEveryEntry(t *testing.T) {
	for _, size := range []struct{ published, journaled int }{{1, 0}, {0, 1}, {2, 0}, {7, 6}, {255, 1}, {256, 0}, {256, 1}, {300, 77}, {700, 0}} {
		dir := makeCrashed(t, size.published, size.journaled)
		all := size.published + size.journaled
		for n := 0; n < all; n += 1 + all/60 {
			entry, proof, err := Prove(dir, testVerifier, int64(n))
			if err != nil {
				t.Fatalf("entry %d of %v: %v", n, size, err)
			}
			v, err := VerifyReceipt(proof, VerifyReceiptOptions{Key: testVerifier})
			if err != nil || v.First != int64(n) || !bytes.Equal(v.Entries[0], entry) || v.Size != int64(all) {
				t.Fatalf("entry %d of %v: got %+v, %v", n, size, v, err)
			}
		}
		if _, _, err := Prove(dir, testVerifier, int64(all)); err == nil || !strings.Contains(err.Error(), fmt.Sprintf("no entry %d", all)) {
			t.Errorf("an entry beyond the end: %v", err)
		}
	}
}

func TestProofEveryBit(t *testing.T) {
	_, good, err := Prove(makeLog(t, 5), testVerifier, 2)
	if err != nil {
		t.Fatal(err)
	}
	for i := range good {
		for bit := range 8 {
			bad := bytes.Clone(good)
			bad[i] ^= 1 << bit
			if _, err := VerifyReceipt(bad, VerifyReceiptOptions{Key: testVerifier}); err == nil {
				t.Fatalf("byte %d, bit %d: %q was accepted", i, bit, bad[max(0, i-20):min(len(bad), i+20)])
			}
		}
	}
	for name, change := range map[string]func(string) string{
		"no extra":        func(s string) string { return s[:len(proofMagic)+1] + s[strings.Index(s, "index "):] },
		"a hash less":     func(s string) string { return dropLine(s, 3) },
		"a hash twice":    func(s string) string { return strings.Replace(s, line(s, 3), line(s, 3)+line(s, 3), 1) },
		"a long path":     func(s string) string { return strings.Replace(s, line(s, 3), strings.Repeat(line(s, 3), 100), 1) },
		"CR in the entry": func(s string) string { return strings.Replace(s, "\nindex", "\r\nindex", 1) },
		"CR in a hash":    func(s string) string { return strings.Replace(s, line(s, 3), strings.TrimSpace(line(s, 3))+"\r\n", 1) },
		"trailing data":   func(s string) string { return s + "x" },
		"trailing line":   func(s string) string { return s + "\n" },
		"another index":   func(s string) string { return strings.Replace(s, "index 2", "index 3", 1) },
		"index with zero": func(s string) string { return strings.Replace(s, "index 2", "index 02", 1) },
	} {
		if v, err := VerifyReceipt([]byte(change(string(good))), VerifyReceiptOptions{Key: testVerifier}); err == nil {
			t.Errorf("%s: accepted: %+v", name, v)
		}
	}
}

func line(s string, n int) string { return strings.SplitAfter(s, "\n")[n] }

func dropLine(s string, n int) string { return strings.Replace(s, line(s, n), "", 1) }

// A log that was damaged gives no proof rather than one that does not hold.
func TestNoProofOfADamagedLog(t *testing.T) {
	for name, damage := range map[string]func(data []byte){
		"tile/0/000.p/22":       func(data []byte) { data[40] ^= 1 },
		"tile/entries/000.p/22": func(data []byte) { data[bytes.Index(data, []byte("operator"))] ^= 1 },
	} {
		dir := makeSessions(t, 5)
		file := filepath.Join(dir, name)
		data, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		damage(data)
		if err := os.WriteFile(file, data, 0o600); err != nil {
			t.Fatal(err)
		}
		if raw, err := NewReceipt(dir, ReceiptOptions{Key: testVerifier, Session: "s-a"}); err == nil {
			t.Errorf("%s: got a receipt of %d bytes", name, len(raw))
		}
		if _, proof, err := Prove(dir, testVerifier, 0); err == nil {
			t.Errorf("%s: got a proof: %s", name, proof)
		}
	}
}

// cosign adds the cosignature of a witness to a checkpoint.
func cosign(signed []byte, name string, key ed25519.PrivateKey, unix int64) []byte {
	body := signed[:bytes.LastIndex(signed, []byte("\n\n"))+1]
	raw := binary.BigEndian.AppendUint32(nil, witnessID(name, key.Public().(ed25519.PublicKey)))
	raw = binary.BigEndian.AppendUint64(raw, uint64(unix))
	raw = append(raw, ed25519.Sign(key, cosignedText(body, unix))...)
	return fmt.Appendf(bytes.Clone(signed), "— %s %s\n", name, base64.StdEncoding.EncodeToString(raw))
}

// later adds a second to the time of the last cosignature.
func later(signed []byte) []byte {
	at := bytes.LastIndexByte(signed, ' ') + 1
	raw, err := base64.StdEncoding.DecodeString(string(signed[at : len(signed)-1]))
	if err != nil {
		panic(err)
	}
	raw[11]++
	return fmt.Appendf(bytes.Clone(signed[:at]), "%s\n", base64.StdEncoding.EncodeToString(raw))
}

func TestReceiptCosigned(t *testing.T) {
	dir := makeSessions(t, 3)
	key := newKey(3)
	witness := WitnessKey("cal/authority", key.Public().(ed25519.PublicKey))
	signed, err := os.ReadFile(filepath.Join(dir, checkpointName))
	if err != nil {
		t.Fatal(err)
	}
	plain := mustReceipt(t, dir, ReceiptOptions{Session: "s-a"})
	wantRefused(t, plain, VerifyReceiptOptions{Witnesses: []string{witness}}, NoCosignature)
	for _, c := range []struct {
		name string
		note []byte
		kind ProblemKind // empty: accepted
	}{
		{"by the witness", cosign(signed, "cal/authority", key, 1700000000), ""},
		{"by two", cosign(cosign(signed, "cal/authority", key, 1700000000), "w2", newKey(4), 1), ""},
		{"by another of that name too", cosign(cosign(signed, "cal/authority", newKey(4), 1), "cal/authority", key, 1700000000), ""},
		{"by another of that name", cosign(signed, "cal/authority", newKey(4), 1700000000), NoCosignature},
		{"by its key in another name", cosign(signed, "cal/authority2", key, 1700000000), NoCosignature},
		{"twice", cosign(cosign(signed, "cal/authority", key, 1700000000), "cal/authority", key, 1700000001), Malformed},
		{"of another time than it says", later(cosign(signed, "cal/authority", key, 1700000000)), NoCosignature},
	} {
		raw, err := NewReceipt(dir, ReceiptOptions{Key: testVerifier, Session: "s-a", Checkpoint: c.note})
		if err != nil {
			t.Errorf("%s: %v", c.name, err)
			continue
		}
		v, err := VerifyReceipt(raw, VerifyReceiptOptions{Key: testVerifier, Witnesses: []string{witness}})
		if c.kind == "" && (err != nil || len(v.Witnesses) != 1 || v.Witnesses[0] != (Witnessed{"cal/authority", 1700000000})) {
			t.Errorf("%s: got %+v, %v", c.name, v, err)
		}
		if c.kind != "" {
			wantRefused(t, raw, VerifyReceiptOptions{Witnesses: []string{witness}}, c.kind)
		}
	}
	// What lies in the log cosigned is taken, if it covers the session.
	l := mustOpen(t, dir, testOptions())
	cosigned := cosign(signed, "cal/authority", key, 1700000000)
	if err := l.Keep(cosigned); err != nil {
		t.Fatal(err)
	}
	covered := func() bool {
		_, err := VerifyReceipt(mustReceipt(t, dir, ReceiptOptions{Session: "s-a"}), VerifyReceiptOptions{Key: testVerifier, Witnesses: []string{witness}})
		_, proof, proofErr := Prove(dir, testVerifier, 3)
		if proofErr == nil {
			_, proofErr = VerifyReceipt(proof, VerifyReceiptOptions{Key: testVerifier, Witnesses: []string{witness}})
		}
		if proofErr != nil {
			t.Errorf("a proof under the cosigned checkpoint: %v", proofErr)
		}
		return err == nil
	}
	if !covered() {
		t.Error("a receipt is not under the cosigned checkpoint that covers it")
	}
	appendAll(t, l, callEntries(t, "s-b", 7)...)
	if !covered() {
		t.Error("a receipt is not under the cosigned checkpoint, though only another session went on")
	}
	appendAll(t, l, callEntries(t, "s-a", 7)...)
	if covered() {
		t.Error("the cosigned checkpoint does not cover the session, and was taken")
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	for _, key := range []string{"", "x", testVerifier, witness + "x", strings.Replace(witness, "cal/", "cel/", 1)} {
		_, err := VerifyReceipt(plain, VerifyReceiptOptions{Key: testVerifier, Witnesses: []string{key}})
		var refused *ReceiptError
		if err == nil || errors.As(err, &refused) {
			t.Errorf("witness key %q: got %v, want an error that is no refusal", key, err)
		}
	}
}

// The log's key holder can write what it likes into the log, but not what the machine
// signed.
func TestReceiptOutcomes(t *testing.T) {
	sign := func(o nucleus.Outcome) *nucleus.Signed {
		signed, err := nucleus.Sign(machineKey, nucleus.DomainOutcome, o)
		if err != nil {
			t.Fatal(err)
		}
		return &signed
	}
	// onHost makes the entry one of a push that the node did, with what the machine signed.
	onHost := func(e *nucleus.Entry, status, admitted string) {
		e.Op, e.Status = nucleus.GitPush, status
		o := nucleus.Outcome{Permit: e.Permit, Pod: e.Pod, Boot: "b-s-a", Status: status}
		if admitted != "" {
			admission := o
			admission.Status = admitted
			o.Admission = sign(admission)
		}
		o.Message = "by the node"
		e.Outcome = sign(o) // by whose key, nobody looks
	}
	for _, c := range []struct {
		name              string
		change            func(e *nucleus.Entry)
		kind              ProblemKind
		signed, unchecked int
	}{
		{"as it was", func(*nucleus.Entry) {}, "", 1, 0},
		{"another signature", func(e *nucleus.Entry) { e.Outcome.Sig[5] ^= 1 }, BadOutcome, 0, 0},
		{"another statement", func(e *nucleus.Entry) {
			e.Outcome.Payload = bytes.Replace(e.Outcome.Payload, []byte(`"done"`), []byte(`"failed"`), 1)
			e.Status = nucleus.OutcomeFailed
		}, BadOutcome, 0, 0},
		{"of another permit", func(e *nucleus.Entry) { e.Permit = "r-other" }, BadOutcome, 0, 0},
		{"no JSON", func(e *nucleus.Entry) { e.Outcome.Payload = []byte("x\n") }, BadOutcome, 0, 0},
		{"the entry says otherwise", func(e *nucleus.Entry) { e.Status = nucleus.OutcomeFailed }, BadOutcome, 0, 0},
		{"the entry says nothing was done", func(e *nucleus.Entry) { e.Status = nucleus.OutcomeRefused }, BadOutcome, 0, 0},
		{"the entry says unknown", func(e *nucleus.Entry) { e.Status = nucleus.OutcomeUnknown }, "", 1, 0},
		{"done, and nobody signed", func(e *nucleus.Entry) { e.Outcome = nil }, "", 0, 1},
		{"unknown, and nobody signed", func(e *nucleus.Entry) { e.Outcome, e.Status = nil, nucleus.OutcomeUnknown }, "", 0, 0},
		{"another boot", func(e *nucleus.Entry) {
			e.Outcome = sign(nucleus.Outcome{Permit: e.Permit, Pod: e.Pod, Boot: "b-2", Status: e.Status})
		}, "", 0, 1},
		{"a push", func(e *nucleus.Entry) { onHost(e, nucleus.OutcomeDone, nucleus.OutcomeAdmitted) }, "", 1, 0},
		{"a push that failed", func(e *nucleus.Entry) { onHost(e, nucleus.OutcomeFailed, nucleus.OutcomeAdmitted) }, "", 1, 0},
		{"a push that the machine refused", func(e *nucleus.Entry) { onHost(e, nucleus.OutcomeRefused, nucleus.OutcomeRefused) }, "", 1, 0},
		{"a push of a pod that had ended", func(e *nucleus.Entry) { onHost(e, nucleus.OutcomeRefused, nucleus.OutcomeAdmitted) }, "", 1, 0},
		{"a push that could not be asked for", func(e *nucleus.Entry) { onHost(e, nucleus.OutcomeRefused, "") }, "", 0, 0},
		{"a push without admission", func(e *nucleus.Entry) { onHost(e, nucleus.OutcomeDone, "") }, BadOutcome, 0, 0},
		{"a push against the machine's word", func(e *nucleus.Entry) { onHost(e, nucleus.OutcomeDone, nucleus.OutcomeRefused) }, BadOutcome, 0, 0},
	} {
		dir := filepath.Join(t.TempDir(), "log")
		l := mustOpen(t, dir, testOptions())
		call := callEntries(t, "s-a", 1)
		c.change(&call[1])
		appendAll(t, l, append([]nucleus.Entry{startEntry("s-a")}, call...)...)
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
		raw, err := NewReceipt(dir, ReceiptOptions{Key: testVerifier, Session: "s-a"})
		var refused *ReceiptError
		if c.kind == "" && err != nil || c.kind != "" && (!errors.As(err, &refused) || refused.Kind != c.kind) {
			t.Errorf("%s: got %d bytes, %v; want kind %q", c.name, len(raw), err, c.kind)
		}
		if err != nil {
			continue
		}
		if v, err := VerifyReceipt(raw, VerifyReceiptOptions{Key: testVerifier}); err != nil || v.Signed != c.signed || v.Unchecked != c.unchecked {
			t.Errorf("%s: %d signed and %d not, %v; want %d and %d", c.name, v.Signed, v.Unchecked, err, c.signed, c.unchecked)
		}
	}
}

// In a receipt that leaves nothing out, what came of a request has the request before it.
func TestReceiptOutcomeOfNothing(t *testing.T) {
	for name, c := range map[string]struct {
		entries []string
		ok      bool
	}{
		"an intent and its outcome": {[]string{nucleus.KindIntent, nucleus.KindOutcome}, true},
		"an outcome alone":          {[]string{nucleus.KindOutcome}, false},
		"two outcomes":              {[]string{nucleus.KindIntent, nucleus.KindOutcome, nucleus.KindOutcome}, false},
		"the outcome first":         {[]string{nucleus.KindOutcome, nucleus.KindIntent}, false},
	} {
		dir := filepath.Join(t.TempDir(), "log")
		l := mustOpen(t, dir, linkedOptions())
		appendAll(t, l, ofSession("s-a", nucleus.KindPodCreate))
		for _, kind := range c.entries {
			e := ofSession("s-a", kind)
			e.Permit, e.Status = "r-1", nucleus.OutcomeUnknown
			appendAll(t, l, e)
		}
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
		_, err := NewReceipt(dir, ReceiptOptions{Key: testVerifier, Session: "s-a"})
		var refused *ReceiptError
		if c.ok && err != nil || !c.ok && (!errors.As(err, &refused) || refused.Kind != BadOutcome) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestReceiptIsBounded(t *testing.T) {
	if testing.Short() {
		t.Skip("takes 100 MB")
	}
	big := bytes.Repeat([]byte(receiptMagic+"\n"), 100<<20/(len(receiptMagic)+1))
	var packed bytes.Buffer
	z, _ := gzip.NewWriterLevel(&packed, gzip.BestCompression)
	const lines = 3000 // of 60 KB: 180 MB in 400 KB
	for i := range lines {
		fmt.Fprintf(z, "e {\"a\":\"%s\",\"kind\":\"x\",\"seq\":%d,\"session\":\"s-a\",\"time\":\"\"}\n", bytes.Repeat([]byte("a"), 60_000), i)
	}
	z.Close()
	note := signedText(t, testOrigin+"\n90000\n"+EmptyRoot.String()+"\n")
	rest := append([]byte(note), packed.Bytes()...)
	bomb := fmt.Appendf(nil, "%s\nsession s-a\nentries %d from 0 to %d\ncheckpoint %d\nbody gzip %d\nsha256 %x\n\n%s",
		receiptMagic, lines, lines-1, len(note), packed.Len(), sha256.Sum256(rest), rest)
	for name, raw := range map[string][]byte{"100 MB": big, "a bomb": bomb} {
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		wantRefused(t, raw, VerifyReceiptOptions{}, TooLarge)
		runtime.ReadMemStats(&after)
		if used := after.TotalAlloc - before.TotalAlloc; used > 8*maxBody {
			t.Errorf("%s: took %d MiB", name, used>>20)
		}
	}
}

// The receipt of a session of 200 calls is smaller than 100 KB, with the calls to the
// model that led to them, and beside a session that is as busy.
func TestReceiptSize(t *testing.T) {
	model := func(session string, i int) []nucleus.Entry {
		call := map[string]any{"done": false, "host": "api.anthropic.com", "id": nucleus.NewID("mc-"), "method": "POST", "path": "/v1/messages", "pod": "p-" + session, "port": 443,
			"protocol": "anthropic", "received": 0, "sent": 0, "session": session, "tokens": map[string]int{"input": 0, "output": 0}, "took": 0, "usd": 0}
		begun, _ := json.Marshal(call)
		call["done"], call["model"], call["received"], call["sent"], call["status"] = true, "claude-sonnet-4-5", 700+i*7919%9000, 6000+i*104729%90000, 200
		call["tokens"], call["took"], call["usd"] = map[string]int{"input": 1500 + i*7919%30000, "output": i * 6961 % 900}, 900000000+i*15485863%5000000000, float64(i*7919%20000)/1e6
		ended, _ := json.Marshal(call)
		e := nucleus.Entry{Pod: "p-" + session, Session: session, Actor: "agent", Kind: nucleus.KindModelCall}
		first, last := e, e
		first.Data, last.Data = begun, ended
		return []nucleus.Entry{first, last}
	}
	dir := filepath.Join(t.TempDir(), "log")
	now := time.Unix(1700000000, 0)
	l := mustOpen(t, dir, Options{Origin: testOrigin, Key: testKey, Link: true, Now: func() time.Time {
		now = now.Add(time.Duration(now.UnixNano()*7919%400_000_000) + 1)
		return now
	}})
	appendAll(t, l, startEntry("s-quiet"), startEntry("s-a"), startEntry("s-b"))
	for i := range 200 {
		appendAll(t, l, append(model("s-quiet", i), callEntries(t, "s-quiet", i)...)...)
	}
	for i := range 200 {
		for _, pair := range [][2][]nucleus.Entry{{model("s-a", i), model("s-b", i)}, {callEntries(t, "s-a", i), callEntries(t, "s-b", i)}} {
			appendAll(t, l, pair[0][0], pair[1][0], pair[0][1], pair[1][1]) // each beside one of the other session
		}
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	for _, session := range []string{"s-quiet", "s-a"} {
		started := time.Now()
		raw := mustReceipt(t, dir, ReceiptOptions{Session: session})
		made := time.Since(started)
		started = time.Now()
		v, err := VerifyReceipt(raw, VerifyReceiptOptions{Key: testVerifier})
		if err != nil || len(v.Entries) != 801 {
			t.Fatalf("%v, %d entries", err, len(v.Entries))
		}
		t.Logf("%s: 801 entries, %d between: %d bytes, made in %v, verified in %v; as text %d bytes", session, v.Between, len(raw), made, time.Since(started), len(mustReceipt(t, dir, ReceiptOptions{Session: session, Text: true})))
		if session == "s-quiet" && len(raw) >= 100_000 {
			t.Errorf("%d bytes", len(raw))
		}
	}
}

func TestFold(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		size := rapid.Int64Range(1, 700).Draw(t, "size")
		chosen := rapid.SliceOfNDistinct(rapid.Int64Range(0, size-1), 1, int(min(size, 40)), rapid.ID[int64]).Draw(t, "indexes")
		slices.Sort(chosen)
		all := make([]tlog.Hash, size)
		var tr tree
		for i := range all {
			all[i] = tlog.RecordHash(fmt.Appendf(nil, "leaf %d", i))
			tr.add(all[i])
		}
		var hashes, leaves []tlog.Hash
		if err := walk(chosen, 0, size, func(lo, hi int64) error {
			var part tree
			for _, h := range all[lo:hi] {
				part.add(h)
			}
			hashes = append(hashes, part.root())
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		for _, i := range chosen {
			leaves = append(leaves, all[i])
		}
		root, _, ok := fold(chosen, leaves, hashes, size)
		if !ok || root != tr.root() {
			t.Fatalf("size %d, indexes %v: got root %v, %v; want %v", size, chosen, root, ok, tr.root())
		}
		// Any hash or leaf that differs leads to another root.
		if i := rapid.IntRange(0, len(leaves)-1).Draw(t, "leaf"); true {
			leaves[i][3] ^= 4
		}
		if root, _, _ := fold(chosen, leaves, hashes, size); root == tr.root() {
			t.Fatalf("size %d, indexes %v: a changed leaf leads to the same root", size, chosen)
		}
	})
}

// A receipt is made while the log is written and published.
func TestReceiptWhileWriting(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "log")
	l := mustOpen(t, dir, testOptions())
	appendAll(t, l, startEntry("s-a"))
	done, stopped := make(chan struct{}), make(chan error, 1)
	go func() {
		for i := 0; ; i++ {
			select {
			case <-done:
				stopped <- l.Close()
				return
			default:
			}
			if _, err := l.Append(entryNumber(i)); err != nil {
				stopped <- err
				return
			}
			if i%7 == 0 {
				if err := l.Publish(); err != nil {
					stopped <- err
					return
				}
			}
		}
	}()
	for range 60 {
		raw, err := NewReceipt(dir, ReceiptOptions{Key: testVerifier, Session: "s-a"})
		if err == nil {
			_, err = VerifyReceipt(raw, VerifyReceiptOptions{Key: testVerifier})
		}
		if err != nil {
			t.Error(err)
			break
		}
	}
	close(done)
	if err := <-stopped; err != nil {
		t.Error(err)
	}
}

// The document is enough: a verifier of another language, written from it, says the same.
func TestReceiptByAnotherProgram(t *testing.T) {
	python, err := exec.LookPath("python3")
	if err != nil {
		t.Skip("python3 is not installed")
	}
	dir := makeSessions(t, 5)
	program := filepath.Join("testdata", "verify_receipt.py")
	run := func(raw []byte, key string) (string, error) {
		file := filepath.Join(t.TempDir(), "receipt")
		if err := os.WriteFile(file, raw, 0o600); err != nil {
			t.Fatal(err)
		}
		out, err := exec.CommandContext(t.Context(), python, program, file, key).CombinedOutput()
		return string(out), err
	}
	packed := mustReceipt(t, dir, ReceiptOptions{Session: "s-b"})
	text := mustReceipt(t, dir, ReceiptOptions{Session: "s-b", Text: true})
	for _, raw := range [][]byte{packed, text} {
		out, err := run(raw, testVerifier)
		if err != nil || !strings.Contains(out, "11 entries from 1 to 21 of cal.test/log, 10 between") {
			t.Errorf("got %s, %v", out, err)
		}
	}
	linked := linkedSessions(t)
	if out, err := run(mustReceipt(t, linked, ReceiptOptions{Session: "s-b"}), testVerifier); err != nil || !strings.Contains(out, "all of the session to there") {
		t.Errorf("got %s, %v", out, err)
	}
	if out, err := run(packed, testVerifier); err != nil || !strings.Contains(out, "maybe not all") {
		t.Errorf("without links: got %s, %v", out, err)
	}
	for name, raw := range map[string][]byte{
		"one left out":       partReceipt(t, linked, "s-b", 0b110111),
		"the first left out": partReceipt(t, linked, "s-b", 0b111110),
		"changed":            edited(t, text, func(r *receipt) { r.entries[1] = bytes.Replace(r.entries[1], []byte("allow"), []byte("deny"), 1) }),
		"dropped":            edited(t, text, func(r *receipt) { r.entries, r.indexes = r.entries[1:], r.indexes[1:] }),
		"flipped":            func() []byte { raw := bytes.Clone(packed); raw[len(raw)-40] ^= 1; return raw }(),
	} {
		if out, err := run(raw, testVerifier); err == nil {
			t.Errorf("%s: accepted: %s", name, out)
		}
	}
	if out, err := run(packed, VerifierKey(testOrigin, newKey(1).Public().(ed25519.PublicKey))); err == nil && !strings.Contains(out, "signature not checked") {
		t.Errorf("another key: accepted: %s", out)
	}
}

func FuzzReceipt(f *testing.F) {
	dir := makeLog(f, 7) // the same in every process
	genuine := map[string]bool{}
	for raw, err := range ReadRaw(dir, 0) {
		if err != nil {
			f.Fatal(err)
		}
		genuine[string(raw)] = true
	}
	f.Add(mustReceipt(f, dir, ReceiptOptions{Session: "s-1"}))
	f.Add(mustReceipt(f, dir, ReceiptOptions{Session: "s-1", Text: true}))
	_, proof, err := Prove(dir, testVerifier, 3)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(proof)
	f.Fuzz(func(t *testing.T, raw []byte) {
		for _, raw := range [][]byte{raw, resum(t, raw)} {
			v, err := VerifyReceipt(raw, VerifyReceiptOptions{Key: testVerifier})
			if err != nil {
				continue
			}
			for _, entry := range v.Entries {
				if !genuine[string(entry)] {
					t.Fatalf("accepted an entry that is not in the log: %s", entry)
				}
			}
		}
	})
}
