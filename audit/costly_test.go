package audit

import (
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"cal/nucleus"

	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"
)

// cheap fails where something takes more than two minutes, or more megabytes than it may. An
// honest run takes a small part of either, on a busy host too.
func cheap(t *testing.T, what string, megabytes uint64, do func()) {
	t.Helper()
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	done := make(chan struct{})
	go func() { defer close(done); do() }()
	select {
	case <-done:
	case <-time.After(2 * time.Minute):
		t.Fatalf("%s: it does not end", what)
	}
	runtime.ReadMemStats(&after)
	if grown := (after.TotalAlloc - before.TotalAlloc) >> 20; grown > megabytes {
		t.Errorf("%s: %d MB were taken, at most %d are needed", what, grown, megabytes)
	}
}

// signedText is a note of the test log's key.
func signedText(t *testing.T, text string) string {
	t.Helper()
	s, err := newSigner(testOrigin, testKey)
	if err != nil {
		t.Fatal(err)
	}
	signed, err := note.Sign(&note.Note{Text: text}, s)
	if err != nil {
		t.Fatal(err)
	}
	return string(signed)
}

// The size in a checkpoint may be any number: nobody counts up to it, whether nobody has
// signed it, or the key's holder means harm, or files far away claim to be of the log.
func TestSizeIsNotBelieved(t *testing.T) {
	source := makeLog(t, 300)
	honest, err := os.ReadFile(filepath.Join(source, checkpointName))
	if err != nil {
		t.Fatal(err)
	}
	root := strings.Split(string(honest), "\n")[2]
	for _, size := range []int64{301, 1 << 40, 1 << 62, 1<<63 - 1} {
		huge := fmt.Sprintf("%s\n%d\n%s\n", testOrigin, size, root)
		signature := string(honest[bytes.Index(honest, []byte("\n\n"))+1:])
		unsigned, signed := huge+signature, signedText(t, huge)
		start, err := journalStart(base{Checkpoint: unsigned, Open: []int64{}})
		if err != nil {
			t.Fatal(err)
		}
		for name, c := range map[string]struct {
			checkpoint, journal string
			kind                ProblemKind
		}{
			"unsigned":                      {unsigned, "", BadSignature},
			"signed":                        {signed, "", Truncated},
			"unsigned, a journal":           {unsigned, string(start), BadSignature},
			"signed small, a journal":       {string(honest), string(start), BadSignature},
			"signed, and a journal":         {signed, string(start), Truncated},
			"not a checkpoint, and journal": {"x", string(start), ""},
		} {
			for _, far := range []string{"", "tile/entries/x999/x999/x999/x999/999", "tile/entries/x036/x028/x797/x018/x963/967", "tile/0/x018/x014/x398/x509/x481/983.p/255"} {
				what := fmt.Sprintf("%d %s %s", size, name, far)
				dir := filepath.Join(t.TempDir(), "log")
				copyDir(t, source, dir)
				write(t, filepath.Join(dir, checkpointName), c.checkpoint)
				if err := os.Remove(filepath.Join(dir, journalName)); err != nil {
					t.Fatal(err)
				}
				if c.journal != "" {
					write(t, filepath.Join(dir, journalName), c.journal)
				}
				if far != "" {
					if err := os.MkdirAll(filepath.Dir(filepath.Join(dir, far)), 0o700); err != nil {
						t.Fatal(err)
					}
					write(t, filepath.Join(dir, far), "x")
				}
				cheap(t, what, 100, func() {
					r, err := verify(dir, VerifyOptions{Key: testVerifier}, 0)
					if c.kind == "" {
						if err == nil {
							t.Errorf("%s: %v", what, r.Problems)
						}
						return
					}
					if err != nil || !slices.ContainsFunc(r.Problems, func(p Problem) bool { return p.Kind == c.kind }) || len(r.Problems)+r.More > 20 {
						t.Errorf("%s: got %+v, %v", what, r, err)
					}
					if name == "unsigned" && far == "" && r.Published != 300 {
						t.Errorf("%s: the files have 300 entries, %d are said to be published", what, r.Published)
					}
					n := 0
					for range Read(dir, 0) {
						n++
					}
					if n > 301 {
						t.Errorf("%s: %d entries are read", what, n)
					}
				})
			}
		}
	}
}

// Where bundles are missing, verification goes on behind them.
func TestMissingBundles(t *testing.T) {
	dir := makeLog(t, 6*tileWidth+3)
	for _, name := range []string{"tile/entries/001", "tile/0/001", "tile/entries/002", "tile/0/002", "tile/entries/003", "tile/0/003"} {
		if err := os.Remove(filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	last := filepath.Join(dir, "tile/entries/005")
	raw, err := os.ReadFile(last)
	if err != nil {
		t.Fatal(err)
	}
	write(t, last, strings.Replace(string(raw), "file-1300", "file-1301", 1))
	got := map[string]bool{}
	for _, p := range mustVerify(t, dir, nil).Problems {
		got[p.String()] = true
	}
	for _, want := range []string{
		"missing, entry 256, tile/entries/001: entries 256 to 511", "missing, entry 512: entries 512 to 1023: neither bundles nor tiles are there",
		"changed, entry 1300, tile/entries/005: the entry is not the one in the tree",
	} {
		if !got[want] {
			t.Errorf("not said: %s", want)
		}
	}
	if t.Failed() {
		t.Logf("got %v", got)
	}
}

// hollow is a frame whose header is right and whose payload, which it does not bring
// along, is not.
func hollow(n uint32) []byte {
	f := binary.BigEndian.AppendUint32(nil, n)
	f = append(f, "xxxx"...)
	return binary.BigEndian.AppendUint32(f, crc32.Checksum(f, castagnoli))
}

// Many headers, each of which claims all that follows: whoever sums what each one
// claims takes hours.
func TestHollowFrames(t *testing.T) {
	for name, n := range map[string]uint32{"far": 1 << 20, "near": 1 << 16, "nothing": 0, "beyond a record": maxRecord + 1, "beyond the end": 1<<32 - 1} {
		for _, size := range []int{1, 4 << 20, 64 << 20} {
			what := fmt.Sprintf("%s, %d", name, size)
			tail := bytes.Repeat(hollow(n), size/frameHeader+1)
			dir := makeCrashed(t, 3, 3)
			path := filepath.Join(dir, journalName)
			honest, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			torn := size == 1 || n > maxRecord && size < maxRecord
			write(t, path, string(append(bytes.Clone(honest), tail...)))
			cheap(t, what, 2000, func() { // the file's bytes, for each of those who read it
				_, err := parseJournal(append(bytes.Clone(honest), tail...), nil)
				if damaged := errors.Is(err, errDamaged); damaged == torn {
					t.Errorf("%s: got %v, want damage: %v", what, err, !torn)
				}
				if l, err := Open(dir, testOptions()); (err == nil) != torn {
					t.Errorf("%s: opened: %v", what, err)
				} else if err == nil {
					l.Close()
				}
			})
		}
	}
}

// A record of entries without a byte, each many times larger in memory.
func TestHollowEntries(t *testing.T) {
	dir := makeCrashed(t, 3, 0)
	path := filepath.Join(dir, journalName)
	honest, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	write(t, path, string(honest)+string(journalRecord([]byte(signedText(t, testOrigin+"\n16777219\n"+EmptyRoot.String()+"\n")), make([]byte, 32<<20))))
	cheap(t, "a record", 500, func() {
		if _, err := Open(dir, testOptions()); err == nil {
			t.Error("it opened")
		}
		if r, err := verify(dir, VerifyOptions{Key: testVerifier}, 0); err != nil || r.OK() {
			t.Errorf("got %+v, %v", r, err)
		}
	})
	// Bundles: holes in the file, so the archive of it is small.
	dir = makeLog(t, 4*tileWidth+3)
	for _, name := range []string{"tile/entries/000", "tile/entries/001", "tile/entries/002", "tile/entries/004.p/3"} {
		if err := sparse(filepath.Join(dir, name), maxBundle); err != nil {
			t.Fatal(err)
		}
	}
	whole := bytes.Repeat(appendBundle(nil, []byte(`{"seq":0}`)), maxBundle/11)
	write(t, filepath.Join(dir, "tile/entries/003"), string(whole))
	cheap(t, "bundles", 300, func() {
		r := mustVerify(t, dir, nil)
		if !slices.ContainsFunc(r.Problems, func(p Problem) bool { return strings.Contains(p.Detail, "entry 0 of the bundle has 0 bytes") }) {
			t.Errorf("got %v", r.Problems)
		}
		if !slices.ContainsFunc(r.Problems, func(p Problem) bool { return strings.Contains(p.Detail, "more than 512 entries in ") }) {
			t.Errorf("got %v", r.Problems)
		}
		for _, err := range Read(dir, 0) {
			if err == nil {
				t.Error("an entry without a byte is read")
			}
			break
		}
	})
}

// forgedReceipt has any checkpoint and body, with header and sum put right.
func forgedReceipt(t *testing.T, count, first, last int64, checkpoint string, form string, body []byte) []byte {
	t.Helper()
	if form == "gzip" {
		var packed bytes.Buffer
		z, _ := gzip.NewWriterLevel(&packed, gzip.BestSpeed)
		if _, err := z.Write(body); err != nil {
			t.Fatal(err)
		}
		if err := z.Close(); err != nil {
			t.Fatal(err)
		}
		body = packed.Bytes()
	}
	rest := append([]byte(checkpoint), body...)
	return fmt.Appendf(nil, "%s\nsession s-a\nentries %d from %d to %d\ncheckpoint %d\nbody %s %d\nsha256 %x\n\n%s",
		receiptMagic, count, first, last, len(checkpoint), form, len(body), sha256.Sum256(rest), rest)
}

// A receipt is refused before its body is looked at where its signature does not hold, and
// where it does - anyone can take a checkpoint from a receipt - at the first line that is of no
// use.
func TestReceiptIsCheap(t *testing.T) {
	text := testOrigin + "\n9000000000000\n" + EmptyRoot.String() + "\n"
	signed := signedText(t, text)
	unsigned := strings.Replace(signed, "9000000000000", "9000000000001", 1)
	long := append(append([]byte(`e {"a":"`), bytes.Repeat([]byte("a"), 60<<20)...), "\"}\n"...)
	hash := []byte("h " + EmptyRoot.String() + "\n")
	var entries bytes.Buffer
	count := int64(0)
	for entries.Len() < maxBody-100 {
		fmt.Fprintf(&entries, "e {\"kind\":\"x\",\"seq\":%d,\"session\":\"s-a\",\"time\":\"\"}\n", count)
		count++
	}
	for _, c := range []struct {
		name      string
		raw       []byte
		megabytes uint64
		kind      ProblemKind
	}{
		{"unsigned, a long entry", forgedReceipt(t, 1, 0, 0, unsigned, "gzip", long), 2, BadSignature},
		{"unsigned, many entries", forgedReceipt(t, count, 0, count-1, unsigned, "gzip", entries.Bytes()), 2, BadSignature},
		{"a long entry", forgedReceipt(t, 1, 0, 0, signed, "gzip", long), 2, TooLarge},
		{"a long entry as text", forgedReceipt(t, 1, 0, 0, signed, "text", long[len(long)-30<<20:]), 2, TooLarge},
		{"a long outcome", forgedReceipt(t, 1, 0, 0, signed, "gzip", append([]byte("o"), long[1:]...)), 2, TooLarge},
		{"many hashes", forgedReceipt(t, 1, 0, 0, signed, "gzip", bytes.Repeat(hash, 1<<20)), 2, Extra},
		{"many entries, one announced", forgedReceipt(t, 1, 0, 0, signed, "gzip", entries.Bytes()), 2, Malformed},
		{"more entries than the log", forgedReceipt(t, count, 0, count-1, signedText(t, strings.Replace(text, "9000000000000", "90", 1)), "gzip", entries.Bytes()), 2, Extra},
		{"a long header", fmt.Appendf(nil, "%s\nsession %s\n\n", receiptMagic, bytes.Repeat([]byte("a"), 30<<20)), 2, Malformed},
		{"a proof of line breaks", append([]byte(proofMagic+"\n"), bytes.Repeat([]byte("\n"), 30<<20)...), 2, TooLarge},
		{"a proof of hashes", append([]byte(proofMagic+"\nextra YQ==\nindex 0\n"), bytes.Repeat([]byte("x\n"), 1<<19)...), 8, Malformed},
		{"many entries", forgedReceipt(t, count, 0, count-1, signed, "gzip", entries.Bytes()), 1000, Missing},
	} {
		cheap(t, c.name, c.megabytes, func() { wantRefused(t, c.raw, VerifyReceiptOptions{}, c.kind) })
	}
}

var printable = regexp.MustCompile(`^[ -~]*$`)

// What a stranger wrote - names of files, headers, lines of signatures - does not
// speak to the terminal.
func TestNothingSpeaksToTheTerminal(t *testing.T) {
	const evil = "\x1b]0;PWNED\a\x1b[2J\u202egpj\u009b31m\x80\n"
	dir := makeLog(t, 5)
	write(t, filepath.Join(dir, "tile", "0", strings.ReplaceAll(evil, "/", "")), "x")
	r := mustVerify(t, dir, nil)
	if len(r.Problems) != 1 {
		t.Errorf("got %v", r.Problems)
	}
	for _, p := range append(r.Problems, Problem{3, Changed, evil, evil}) {
		if !printable.MatchString(p.String()) {
			t.Errorf("raw: %q", p.String())
		}
	}
	want := `extra, tile/0/\u{1b}]0;PWNED\u{7}\u{1b}[2J\u{202e}gpj\u{9b}31m\x{80}\u{a}: it is neither tile nor bundle`
	if got := r.Problems[0].String(); got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
	good := string(mustReceipt(t, makeSessions(t, 2), ReceiptOptions{Session: "s-a", Text: true}))
	sum := regexp.MustCompile(`(?m)^sha256 .*$`)
	for name, raw := range map[string]string{
		"sum":     sum.ReplaceAllLiteralString(good, "sha256 "+strings.TrimSpace(evil)),
		"session": strings.Replace(good, "session s-a", "session "+strings.TrimSpace(evil), 1),
		"form":    strings.Replace(good, "body text", "body "+strings.TrimSpace(evil), 1),
		"magic":   evil + good,
	} {
		_, err := VerifyReceipt([]byte(raw), VerifyReceiptOptions{Key: testVerifier})
		var refused *ReceiptError
		if !errors.As(err, &refused) || refused.Kind != Malformed || !printable.MatchString(err.Error()) {
			t.Errorf("%s: %q", name, err)
		}
	}
	for _, short := range []string{"", "00", strings.Repeat("0", 63), strings.Repeat("0", 65), strings.Repeat("z", 64), strings.Repeat("A", 64)} {
		wantRefused(t, []byte(sum.ReplaceAllLiteralString(good, "sha256 "+short)), VerifyReceiptOptions{}, Malformed)
	}
	if err := refuse(Changed, "%s", evil); !printable.MatchString(err.Error()) {
		t.Errorf("raw: %q", err)
	}
}

// newer are entries of a program that knows more operations, kinds and decisions.
func newer(t *testing.T, n int) (list [][]byte) {
	t.Helper()
	for i := range n {
		raw, err := nucleus.Canonical(map[string]any{
			"seq": i, "time": "2040-01-02T03:04:05Z", "pod": "p-1", "session": "s-1", "kind": "request.consider", "op": "fold_paper", "decision": "perhaps",
			"permit": fmt.Sprint("r-", i), "status": "pondered", "args": map[string]any{"op": "fold_paper", "creases": []int{1}}, "exposure": []string{"future"}, "more": map[string]any{},
		})
		if err != nil {
			t.Fatal(err)
		}
		list = append(list, raw)
	}
	return list
}

// An entry that this program could not read again is refused; one that a newer
// program wrote is read as it is, in tiles and in the journal, and the log goes on.
func TestUnknownOperation(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "log")
	l := mustOpen(t, dir, testOptions())
	for _, op := range []nucleus.Op{"no_such_op", "READ_FILES", "read_files "} {
		if _, err := l.Append(nucleus.Entry{Kind: "x", Op: op}); err == nil || errors.Is(err, ErrFailed) || !strings.Contains(err.Error(), "unknown operation") {
			t.Errorf("%q: %v", op, err)
		}
	}
	for _, op := range append(nucleus.Ops(), "") {
		if _, err := l.Append(nucleus.Entry{Kind: "x", Op: op}); err != nil {
			t.Error(err)
		}
	}
	if err := errors.Join(l.Reopen(), l.Close()); err != nil {
		t.Fatal(err)
	}

	s, err := newSigner(testOrigin, testKey)
	if err != nil {
		t.Fatal(err)
	}
	list := newer(t, 40)
	forger{t: t, dir: dir, entries: list[:30], tiles: true, resign: s}.write()
	tr := &tree{}
	var bundle []byte
	for i, raw := range list {
		tr.add(tlog.RecordHash(raw))
		if i >= 30 {
			bundle = appendBundle(bundle, raw)
		}
	}
	signed, err := s.checkpoint(tr)
	if err != nil {
		t.Fatal(err)
	}
	journal, err := os.ReadFile(filepath.Join(dir, journalName))
	if err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(dir, journalName), string(append(journal, journalRecord(signed, bundle)...)))
	for _, name := range []string{"tile/0/000.p/15", "tile/entries/000.p/15"} { // of the log before
		if err := os.Remove(filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	check := func(size int) {
		t.Helper()
		wantOK(t, dir, nil, int64(size))
		n := 0
		for e, err := range Read(dir, 0) {
			if err != nil {
				t.Fatal(err)
			}
			if n < 40 && (e.Op != "fold_paper" || e.Kind != "request.consider" || e.Verdict != "perhaps") {
				t.Errorf("got %+v", e)
			}
			n++
		}
		if n != size {
			t.Errorf("%d entries, want %d", n, size)
		}
		if got := found(t, dir, Filter{Op: "fold_paper"}); len(got) != 40 {
			t.Errorf("found %v", got)
		}
		if _, err := Compare(dir, dir); err != nil {
			t.Error(err)
		}
		receipt, err := VerifyReceipt(mustReceipt(t, dir, ReceiptOptions{Session: "s-1"}), VerifyReceiptOptions{Key: testVerifier})
		if err != nil || len(receipt.Entries) != 40 {
			t.Errorf("a receipt: %+v, %v", receipt, err)
		}
		_, proof, err := Prove(dir, testVerifier, 35)
		if err == nil {
			_, err = VerifyReceipt(proof, VerifyReceiptOptions{Key: testVerifier})
		}
		if err != nil {
			t.Errorf("a proof: %v", err)
		}
	}
	check(40)
	l = mustOpen(t, dir, testOptions())
	if _, err := l.Append(nucleus.Entry{Kind: "x"}); err != nil {
		t.Error(err)
	}
	if err := errors.Join(l.Reopen(), l.Close()); err != nil {
		t.Fatal(err)
	}
	check(41)
}

// keeping is a disk from which a crash keeps what should be removed.
type keeping struct{ FS }

func (keeping) Remove(string) error { return nil }

// What a crash left of partial tiles is removed by the next writer, wherever it lies, and
// nothing else is.
func TestStalePartialTiles(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "log")
	disk, err := openFiles(dir)
	if err != nil {
		t.Fatal(err)
	}
	o := testOptions()
	o.FS = keeping{disk}
	l := mustOpen(t, dir, o)
	for i := 0; i < 600; i += 20 {
		appendEntries(t, l, i, 20)
		if err := l.Publish(); err != nil {
			t.Fatal(err)
		}
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	partials := func() (names []string) {
		for name := range contents(t, dir) {
			if strings.Contains(name, ".p/") {
				names = append(names, name)
			}
		}
		slices.Sort(names)
		return names
	}
	if n := len(partials()); n < 60 {
		t.Fatalf("the control: %d partial tiles", n)
	}
	beyond := filepath.Join(dir, "tile", "entries", "009.p", "7") // of no tree: Verify says so, and it stays
	if err := os.MkdirAll(filepath.Dir(beyond), 0o700); err != nil {
		t.Fatal(err)
	}
	write(t, beyond, "x")
	if err := os.Symlink(".", filepath.Join(dir, "tile", "0", "x000")); err != nil { // a walk that follows it does not end
		t.Fatal(err)
	}
	l = mustOpen(t, dir, testOptions())
	if err := os.Remove(filepath.Join(dir, "tile", "0", "x000")); err != nil {
		t.Fatal(err)
	}
	want := []string{"tile/0/002.p/88", "tile/1/000.p/2", "tile/entries/002.p/88", "tile/entries/009.p/7"}
	if got := partials(); !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
	for _, name := range []string{"tile/0/000.p", "tile/entries/001.p"} {
		if _, err := os.Stat(filepath.Join(dir, name)); !isMissing(err) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := os.RemoveAll(filepath.Dir(beyond)); err != nil {
		t.Fatal(err)
	}
	appendEntries(t, l, 600, 5)
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	wantOK(t, dir, nil, 605)
}

// The intents that are open are said in words too.
func TestReceiptSaysWhatIsOpen(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "log")
	l := mustOpen(t, dir, testOptions())
	call := func(permit, kind string) nucleus.Entry {
		return nucleus.Entry{Kind: kind, Session: "s-a", Permit: permit, Op: nucleus.ReadFiles}
	}
	says := func() string {
		v, err := VerifyReceipt(mustReceipt(t, dir, ReceiptOptions{Session: "s-a"}), VerifyReceiptOptions{Key: testVerifier})
		if err != nil {
			t.Fatal(err)
		}
		return v.Says()[len(v.Says())-1]
	}
	appendAll(t, l, call("r-1", nucleus.KindIntent), call("r-1", nucleus.KindOutcome))
	if got, want := says(), "each intent that had a permit has its outcome"; got != want {
		t.Errorf("got %q", got)
	}
	appendAll(t, l, call("r-2", nucleus.KindIntent))
	if got, want := says(), "the intent in entry 2 has no outcome: what came of it, this receipt does not prove"; got != want {
		t.Errorf("got %q", got)
	}
	for i := range 30 {
		appendAll(t, l, call(fmt.Sprint("x-", i), nucleus.KindIntent))
	}
	if got := says(); !strings.HasPrefix(got, "the intents in entries 2, 3, 4") || !strings.Contains(got, ", 21, 11 more have no outcome") {
		t.Errorf("got %q", got)
	}
	l.Close()
}

// A bundle in base64 was once decoded before its length was known.
func TestProofOfALargeEntry(t *testing.T) {
	raw := fmt.Appendf(nil, "%s\nextra %s\nindex 0\n\n%s", proofMagic, base64.StdEncoding.EncodeToString(make([]byte, 90_000)), signedText(t, testOrigin+"\n1\n"+EmptyRoot.String()+"\n"))
	wantRefused(t, raw, VerifyReceiptOptions{}, Changed, Malformed)
}
