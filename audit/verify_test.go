package audit

import (
	"context"
	"crypto/ed25519"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"cal/nucleus"

	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"
)

// detected fails the test unless verification sees that something is wrong.
func detected(t *testing.T, dir, what string) {
	t.Helper()
	r, err := verify(dir, VerifyOptions{Key: testVerifier}, 0) // nobody writes it
	if err == nil && r.OK() {
		t.Errorf("%s: not detected", what)
	}
}

// Tiles above level 0, which a small log does not have.
func TestUpperTiles(t *testing.T) {
	dir := makeLog(t, 600)
	path := filepath.Join(dir, "tile/1/000.p/2")
	content := contents(t, dir)["tile/1/000.p/2"]
	for i := range content {
		changed := []byte(content)
		changed[i] ^= 1
		write(t, path, string(changed))
		r := mustVerify(t, dir, nil)
		if len(r.Problems) != 1 || r.Problems[0].Kind != Changed || r.Problems[0].File != "tile/1/000.p/2" {
			t.Fatalf("byte %d: %v", i, r.Problems)
		}
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if r := mustVerify(t, dir, nil); len(r.Problems) != 1 || r.Problems[0].Kind != Missing {
		t.Fatalf("removed: %v", r.Problems)
	}
	write(t, path, content)
	wantOK(t, dir, nil, 600)
}

// Entries that are in tiles and, after a crash, still in the journal.
func TestJournalAndTilesOverlap(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "log")
	l := mustOpen(t, dir, testOptions())
	appendEntries(t, l, 0, 10)
	old := contents(t, dir)[journalName]
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, journalName)
	write(t, path, old) // as if the crash came before the journal was replaced
	wantOK(t, dir, nil, 10)
	j, err := parseJournal([]byte(old), nil)
	if err != nil {
		t.Fatal(err)
	}
	forged, err := journalStart(base{Checkpoint: string(j.note), Open: j.open})
	if err != nil {
		t.Fatal(err)
	}
	for i, r := range j.records {
		raw := r.entries[0]
		if i == 4 {
			raw = []byte(strings.Replace(string(raw), "s-1", "s-2", 1))
		}
		forged = append(forged, journalRecord(r.checkpoint, appendBundle(nil, raw))...)
	}
	write(t, path, string(forged))
	r := mustVerify(t, dir, nil)
	if len(r.Problems) != 1 || r.Problems[0].Index != 4 || r.Problems[0].File != journalName {
		t.Fatalf("%v, want a change of entry 4 in the journal", r.Problems)
	}
	write(t, path, old)
	mustOpen(t, dir, testOptions()).Close()
	wantOK(t, dir, nil, 10)
}

func write(t testing.TB, path, content string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
}

// forger rebuilds a log's files from entries of its choice, as one who can write
// the directory does. What it does not hold is the key.
type forger struct {
	t       *testing.T
	dir     string
	entries [][]byte
	tiles   bool    // rewrite the tiles of hashes too
	resign  *signer // and sign anew
}

func (f forger) write() {
	f.t.Helper()
	tr := &tree{}
	var bundle []byte
	for _, raw := range f.entries {
		tr.add(tlog.RecordHash(raw))
	}
	for _, at := range tlog.NewTiles(tileHeight, 0, tr.size) {
		if at.L == 0 {
			bundle = nil
			for _, raw := range f.entries[at.N*tileWidth : at.N*tileWidth+int64(at.W)] {
				bundle = appendBundle(bundle, raw)
			}
			f.put(bundleOf(at), bundle)
		}
		if f.tiles {
			f.put(at, tr.tile(at))
		}
	}
	if f.resign == nil {
		return
	}
	signed, err := f.resign.checkpoint(tr)
	if err != nil {
		f.t.Fatal(err)
	}
	write(f.t, filepath.Join(f.dir, checkpointName), string(signed))
	start, err := journalStart(base{Checkpoint: string(signed), Open: []int64{}})
	if err != nil {
		f.t.Fatal(err)
	}
	write(f.t, filepath.Join(f.dir, journalName), string(start))
}

func (f forger) put(at tlog.Tile, data []byte) {
	f.t.Helper()
	path := filepath.Join(f.dir, tilePath(at))
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		f.t.Fatal(err)
	}
	write(f.t, path, string(data))
}

func rawEntries(t *testing.T, dir string) [][]byte {
	t.Helper()
	var all [][]byte
	for raw, err := range ReadRaw(dir, 0) {
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, slices.Clone(raw))
	}
	return all
}

// What a forger does to the entries is named by its kind and place, in the last
// bundle and in a full one.
func TestVerifyNamesTheForgery(t *testing.T) {
	const n = 300
	source := makeLog(t, n)
	// What the forger puts in is a true entry of a log of the same name.
	strange, err := encode(nucleus.Entry{Kind: "log.x", Seq: 9})
	if err != nil {
		t.Fatal(err)
	}
	for _, at := range []int{0, 1, 100, 254, 255, 256, 280, n - 2} {
		for _, c := range []struct {
			name  string
			forge func(e [][]byte) [][]byte
			kind  ProblemKind
		}{
			{"change", func(e [][]byte) [][]byte { e[at] = strange; return e }, Changed},
			{"drop", func(e [][]byte) [][]byte { return slices.Delete(e, at, at+1) }, Missing},
			{"insert", func(e [][]byte) [][]byte { return slices.Insert(e, at, strange) }, Extra},
			{"repeat", func(e [][]byte) [][]byte { return slices.Insert(e, at, e[at]) }, Extra},
			{"swap", func(e [][]byte) [][]byte { e[at], e[at+1] = e[at+1], e[at]; return e }, Reordered},
			{"cut", func(e [][]byte) [][]byte { return e[:at] }, Missing},
		} {
			for _, tiles := range []bool{false, true} {
				dir := filepath.Join(t.TempDir(), "forged")
				copyDir(t, source, dir)
				f := forger{t: t, dir: dir, entries: c.forge(rawEntries(t, source)), tiles: tiles}
				// A reader fetches the files of the size that is signed, so a forger
				// writes them under those names.
				f.writeAs(n)
				r := mustVerify(t, dir, nil)
				label := fmt.Sprintf("%s at %d, tiles %v", c.name, at, tiles)
				if r.OK() {
					t.Errorf("%s: not detected", label)
					continue
				}
				if tiles {
					continue // nothing is left to tell the place by but the numbers
				}
				if !slices.ContainsFunc(r.Problems, func(p Problem) bool {
					near := p.Index >= int64(at)-1 && p.Index <= int64(at)+1
					return p.Kind == c.kind && near
				}) {
					t.Errorf("%s: want %q near it, got %v", label, c.kind, r.Problems[:min(4, len(r.Problems))])
				}
			}
		}
	}
	wantOK(t, source, nil, n)
}

// writeAs writes the entries under the file names of a log of another size.
func (f forger) writeAs(size int64) {
	f.t.Helper()
	tr := &tree{}
	for _, raw := range f.entries {
		tr.add(tlog.RecordHash(raw))
	}
	for _, at := range tlog.NewTiles(tileHeight, 0, size) {
		if at.L > 0 {
			continue
		}
		end := (at.N + 1) * tileWidth
		if at.W < tileWidth {
			end = int64(len(f.entries)) // the last bundle takes the rest
		}
		start := min(at.N*tileWidth, int64(len(f.entries)))
		var bundle, hashes []byte
		for _, raw := range f.entries[start:max(start, min(end, int64(len(f.entries))))] {
			h := tlog.RecordHash(raw)
			bundle, hashes = appendBundle(bundle, raw), append(hashes, h[:]...)
		}
		f.put(bundleOf(at), bundle)
		if f.tiles {
			f.put(at, hashes)
		}
	}
}

// Who holds the key can rewrite everything; only a checkpoint kept elsewhere
// tells.
func TestRewriteByTheKeyHolder(t *testing.T) {
	s, err := newSigner(testOrigin, testKey)
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(t.TempDir(), "log")
	l := mustOpen(t, dir, testOptions())
	appendEntries(t, l, 0, 20)
	early := l.Checkpoint()
	appendEntries(t, l, 20, 20)
	kept := l.Checkpoint()
	l.Close()
	wantOK(t, dir, kept, 40)
	wantOK(t, dir, early, 40)
	for _, c := range []struct {
		name  string
		forge func(e [][]byte) [][]byte
		kind  ProblemKind
	}{
		{"rewritten", func(e [][]byte) [][]byte {
			e[3] = []byte(strings.Replace(string(e[3]), "p-1", "p-2", 1))
			return e
		}, Fork},
		{"cut", func(e [][]byte) [][]byte { return e[:38] }, Truncated},
		{"cut and gone on", func(e [][]byte) [][]byte {
			for i := range e[30:] {
				e[30+i] = []byte(strings.Replace(string(e[30+i]), "p-1", "p-2", 1))
			}
			return e
		}, Fork},
	} {
		forged := filepath.Join(t.TempDir(), "forged")
		copyDir(t, dir, forged)
		if err := os.RemoveAll(filepath.Join(forged, "tile")); err != nil {
			t.Fatal(err)
		}
		forger{t: t, dir: forged, entries: c.forge(rawEntries(t, dir)), tiles: true, resign: s}.write()
		if r := mustVerify(t, forged, nil); !r.OK() {
			t.Errorf("%s: the forger made a mistake: %v", c.name, r.Problems)
		}
		r := mustVerify(t, forged, kept)
		if !slices.ContainsFunc(r.Problems, func(p Problem) bool { return p.Kind == c.kind }) {
			t.Errorf("%s: %v, want %q", c.name, r.Problems, c.kind)
		}
	}
	// Numbers that do not count up are seen even so.
	forged := filepath.Join(t.TempDir(), "forged")
	copyDir(t, dir, forged)
	os.RemoveAll(filepath.Join(forged, "tile"))
	forger{t: t, dir: forged, entries: slices.Delete(rawEntries(t, dir), 6, 7), tiles: true, resign: s}.write()
	r := mustVerify(t, forged, nil)
	if len(r.Problems) != 1 || r.Problems[0].Kind != Missing || r.Problems[0].Index != 6 {
		t.Errorf("an entry left out before signing: %v", r.Problems)
	}
}

func TestTruncation(t *testing.T) {
	dir := makeCrashed(t, 5, 4)
	wantOK(t, dir, nil, 9)
	l := mustOpen(t, dir, testOptions())
	kept := l.Checkpoint()
	l.Close()
	old := makeCrashed(t, 5, 3)
	wantOK(t, old, nil, 8) // a shorter log is a log
	r := mustVerify(t, old, kept)
	if len(r.Problems) != 1 || r.Problems[0].Kind != Truncated || r.Problems[0].Index != 8 {
		t.Fatalf("%v, want truncated at 8", r.Problems)
	}
}

// The files that no tree has.
func TestVerifyFindsStrayFiles(t *testing.T) {
	for name, kind := range map[string]ProblemKind{
		"tile/entries/001":       Extra,
		"tile/0/001.p/3":         Extra,
		"tile/3/000.p/1":         Extra,
		"tile/0/000":             Extra,
		"tile/notes.txt":         Extra,
		"tile/0/000.p/3":         Changed, // a partial tile of an earlier size
		"tile/entries/000.p/004": Extra,
	} {
		dir := makeLog(t, 5)
		wantOK(t, dir, nil, 5)
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		write(t, path, "something")
		r := mustVerify(t, dir, nil)
		if len(r.Problems) != 1 || r.Problems[0].Kind != kind || r.Problems[0].File != name {
			t.Errorf("%s: %v, want %q", name, r.Problems, kind)
		}
	}
	// Partial tiles that a crash did not let the writer remove are fine.
	dir := makeLog(t, 5)
	whole, err := os.ReadFile(filepath.Join(dir, "tile/0/000.p/5"))
	if err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(dir, "tile/0/000.p/3"), string(whole[:3*tlog.HashSize]))
	wantOK(t, dir, nil, 5)
}

func TestVerifyRefuses(t *testing.T) {
	dir := makeLog(t, 5)
	foreign, err := newSigner("cal.test/other", testKey)
	if err != nil {
		t.Fatal(err)
	}
	theirs, err := foreign.checkpoint(&tree{})
	if err != nil {
		t.Fatal(err)
	}
	unsigned := fmt.Sprintf("%s\n5\n%s\n\n— %s AAAAAAAA\n", testOrigin, tlog.Hash{}, testOrigin)
	for name, c := range map[string]struct {
		dir  string
		o    VerifyOptions
		want string
	}{
		"no key":                   {dir, VerifyOptions{}, "verifier key"},
		"a private key":            {dir, VerifyOptions{Key: "PRIVATE+KEY+x+00000000+AAAA"}, "verifier key"},
		"not a log":                {t.TempDir(), VerifyOptions{Key: testVerifier}, "not a log"},
		"no directory":             {"/nonexistent/log", VerifyOptions{Key: testVerifier}, "no such file"},
		"another log's checkpoint": {dir, VerifyOptions{Key: testVerifier, Checkpoint: theirs}, `is of log "cal.test/other"`},
		"an unsigned checkpoint":   {dir, VerifyOptions{Key: testVerifier, Checkpoint: []byte(unsigned)}, "bad signature"},
		"an empty checkpoint":      {dir, VerifyOptions{Key: testVerifier, Checkpoint: []byte{}}, "not a checkpoint"},
		"noise for a checkpoint":   {dir, VerifyOptions{Key: testVerifier, Checkpoint: []byte("\n\n\n\n")}, "not a checkpoint"},
	} {
		_, err := Verify(c.dir, c.o)
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", name, err, c.want)
		}
	}
	// A later version may be right; this one cannot say.
	later := makeLog(t, 3)
	write(t, filepath.Join(later, journalName), "cal-journal 2\n{}")
	before := contents(t, later)
	if r, err := Verify(later, VerifyOptions{Key: testVerifier}); err == nil || !strings.Contains(err.Error(), `it is "cal-journal 2", this program reads "cal-journal 1"`) {
		t.Errorf("a later format: %+v, %v", r, err)
	}
	if !maps.Equal(before, contents(t, later)) {
		t.Error("verifying wrote")
	}
	// The right name and another key: the log's signatures are bad.
	key := newKey(1)
	wrong, err := newSigner(testOrigin, key)
	if err != nil {
		t.Fatal(err)
	}
	r, err := Verify(dir, VerifyOptions{Key: verifierOf(wrong)})
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range r.Problems {
		if p.Kind != BadSignature {
			t.Errorf("%v, want bad signatures alone", p)
		}
	}
	if r.OK() {
		t.Error("another key verified the log")
	}
}

func verifierOf(s *signer) string {
	return VerifierKey(s.Name(), s.key.Public().(ed25519.PublicKey))
}

// The list of open intents is under no signature; the entries prove it.
func TestForgedOpenIntents(t *testing.T) {
	dir := makeLog(t, 5) // the last is an intent
	raw := contents(t, dir)[journalName]
	j, err := parseJournal([]byte(raw), nil)
	if err != nil || !slices.Equal(j.open, []int64{4}) {
		t.Fatalf("%v, %v", j.open, err)
	}
	for _, open := range [][]int64{{}, {2}, {2, 4}} {
		start, err := journalStart(base{Checkpoint: string(j.note), Open: open})
		if err != nil {
			t.Fatal(err)
		}
		write(t, filepath.Join(dir, journalName), string(start))
		r := mustVerify(t, dir, nil)
		if len(r.Problems) != 1 || r.Problems[0].Kind != Changed || r.Problems[0].File != journalName {
			t.Errorf("%d: %v", open, r.Problems)
		}
	}
	write(t, filepath.Join(dir, journalName), raw)
	wantOK(t, dir, nil, 5)
}

// Verify and Read beside a writer that publishes all the time.
func TestReadersBesideAWriter(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "log")
	l := mustOpen(t, dir, testOptions())
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	const n = 200
	var readers sync.WaitGroup
	for range 2 {
		readers.Go(func() {
			for ctx.Err() == nil {
				kept := l.Checkpoint()
				r, err := Verify(dir, VerifyOptions{Key: testVerifier, Checkpoint: kept})
				if err != nil || !r.OK() {
					t.Errorf("%v, %v", err, r)
					return
				}
			}
		})
	}
	followed := 0
	readers.Go(func() {
		for raw, err := range Tail(ctx, dir, 0, Filter{}, time.Millisecond) {
			if seq, _ := Seq(raw); err != nil || seq != int64(followed) {
				t.Errorf("followed entry %d: %v, %v", followed, seq, err)
				return
			}
			if followed++; followed == n {
				cancel()
			}
		}
	})
	for i := range n {
		appendEntries(t, l, i, 1)
		if i%3 == 0 {
			if err := l.Publish(); err != nil {
				t.Fatal(err)
			}
		}
	}
	select {
	case <-ctx.Done():
	case <-time.After(20 * time.Second):
		t.Error("the follower did not come to the end")
		cancel()
	}
	readers.Wait()
	if followed != n {
		t.Errorf("followed %d entries, want %d", followed, n)
	}
	l.Close()
	wantOK(t, dir, nil, n)
}

// A copy of what is published, without journal and lock, is a log for
// everybody.
func TestCopyWithoutJournal(t *testing.T) {
	dir := makeLog(t, 300)
	for _, name := range []string{journalName, lockName} {
		if err := os.Remove(filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	wantOK(t, dir, nil, 300)
	if all := readAll(t, dir, 290); len(all) != 10 {
		t.Fatalf("read %d entries, want 10", len(all))
	}
}

// Cosignatures of others do not disturb.
func TestForeignSignatures(t *testing.T) {
	dir := makeLog(t, 3)
	s, err := newSigner("witness.test", newKey(3))
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, checkpointName)
	signed := contents(t, dir)[checkpointName]
	v, err := note.NewVerifier(testVerifier)
	if err != nil {
		t.Fatal(err)
	}
	n, err := note.Open([]byte(signed), note.VerifierList(v))
	if err != nil {
		t.Fatal(err)
	}
	both, err := note.Sign(n, s)
	if err != nil {
		t.Fatal(err)
	}
	write(t, path, string(both))
	wantOK(t, dir, nil, 3)
	l := mustOpen(t, dir, testOptions())
	if string(l.Checkpoint()) != string(both) {
		t.Errorf("the cosignature was lost:\n%s", l.Checkpoint())
	}
	l.Close()
}
