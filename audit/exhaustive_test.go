package audit

import (
	"bytes"
	"crypto/ed25519"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"cal/nucleus"

	"golang.org/x/mod/sumdb/tlog"
)

// The bytes that Verify does not vouch for, and why. Every other byte of every file is
// tried below.
//
//   - lock: it is empty; only the lock on it counts.
//   - checkpoint, cosigned: the lines of others after the log's signature. Who names the
//     witness's key (VerifyOptions.Witnesses) has those of cosigned checked; in checkpoint
//     they are a courtesy to other readers.
//   - journal cut exactly between two records, or gone; cosigned gone; the whole directory
//     as it was earlier: a log that ended earlier, or a copy. A checkpoint kept elsewhere
//     tells, or for cosigned the name of a witness.
//   - files beside those of the format, outside of tile/: nothing reads them.
var notCovered = map[string]func(content string) int{ // from which byte on
	checkpointName: afterOwnSignature, cosignedName: afterOwnSignature,
}

func afterOwnSignature(content string) int {
	own := strings.Index(content, "\n\n") + 2
	return own + strings.Index(content[own:], "\n") + 1
}

var testWitness = newKey(5)
var testWitnessKey = WitnessKey("w.test", testWitness.Public().(ed25519.PublicKey))

// exhaustiveLogs are logs of 50 short entries with a cosigned checkpoint: closed, and as
// a crash leaves it, with the last 25 in five records of the journal.
func exhaustiveLogs(t *testing.T) map[string]string {
	t.Helper()
	closed, crashed := filepath.Join(t.TempDir(), "closed"), filepath.Join(t.TempDir(), "crashed")
	l := mustOpen(t, closed, testOptions())
	for i := 0; i < 50; i += 5 {
		var begun []*Pending
		for j := i; j < i+5; j++ {
			e := nucleus.Entry{Kind: nucleus.KindIntent, Permit: fmt.Sprint(j / 2)}
			if j%2 == 1 {
				e.Kind = nucleus.KindOutcome
			}
			p, err := l.Begin(e)
			if err != nil {
				t.Fatal(err)
			}
			begun = append(begun, p)
		}
		for _, p := range begun {
			if _, err := p.Wait(); err != nil {
				t.Fatal(err)
			}
		}
		if i == 20 {
			mustKeep(t, l)
		}
	}
	copyDir(t, closed, crashed)
	mustKeep(t, l)
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	return map[string]string{"closed": closed, "crashed": crashed}
}

// mustKeep publishes, and keeps what was published with a witness's signature.
func mustKeep(t *testing.T, l *Log) []byte {
	t.Helper()
	if err := l.Publish(); err != nil {
		t.Fatal(err)
	}
	line, err := Cosign(l.Published(), "w.test", testWitness, time.Unix(1700000000, 0))
	if err != nil {
		t.Fatal(err)
	}
	cosigned, err := AddCosignature(l.Published(), line, testWitnessKey)
	if err != nil {
		t.Fatal(err)
	}
	if err := l.Keep(cosigned); err != nil {
		t.Fatal(err)
	}
	return cosigned
}

// tampering is one change of one file; content nil removes it.
type tampering struct {
	what, file string
	content    *string
	kept       bool // only a checkpoint kept elsewhere, or a named witness, tells
}

// tryAll writes each tampering into a copy of the log, beside one another, and wants
// Verify to see it. The copies verify before and after.
func tryAll(t *testing.T, dir string, kept []byte, all []tampering) {
	t.Helper()
	content := contents(t, dir)
	work := make(chan tampering)
	var group sync.WaitGroup
	for range runtime.NumCPU() {
		at := filepath.Join(t.TempDir(), "copy")
		copyDir(t, dir, at)
		wantOK(t, at, kept, 50)
		group.Go(func() {
			for c := range work {
				path := filepath.Join(at, c.file)
				o := VerifyOptions{Key: testVerifier}
				if c.kept {
					o.Checkpoint, o.Witnesses = kept, []string{testWitnessKey}
				}
				var err error
				if c.content == nil {
					err = os.Remove(path)
				} else {
					err = os.WriteFile(path, []byte(*c.content), 0o600)
				}
				r, verifyErr := verify(at, o, 0)
				if err != nil || verifyErr == nil && r.OK() {
					t.Errorf("%s: not detected (%v)", c.what, err)
				}
				if err := os.WriteFile(path, []byte(content[c.file]), 0o600); err != nil {
					t.Error(err)
				}
			}
			if r := mustVerify(t, at, kept); !r.OK() {
				t.Errorf("restored: %v", r.Problems)
			}
		})
	}
	for _, c := range all {
		work <- c
	}
	close(work)
	group.Wait()
}

// Each byte of each file of a log of 50 entries changed, each file cut at each length,
// lengthened, removed.
func TestEveryByteOf50Entries(t *testing.T) {
	for name, dir := range exhaustiveLogs(t) {
		t.Run(name, func(t *testing.T) {
			kept := []byte(contents(t, dir)[checkpointName])
			if name == "crashed" {
				kept = lastOf(t, contents(t, dir)[journalName])
			}
			var all []tampering
			flips, cuts, exempt := 0, 0, 0
			for file, content := range contents(t, dir) {
				if file == lockName {
					continue
				}
				covered := len(content)
				if from := notCovered[file]; from != nil {
					covered = from(content)
				}
				for i := range len(content) {
					changed := []byte(content)
					changed[i] ^= 1 << (i % 8)
					text := string(changed)
					c := tampering{fmt.Sprintf("byte %d of %s flipped", i, file), file, &text, false}
					if i >= covered {
						exempt++
						if file == checkpointName {
							continue // of others, and checked by nobody here
						}
						c.kept = true
					}
					all, flips = append(all, c), flips+1
				}
				boundary := recordBoundaries(t, file, content)
				for n := range len(content) {
					text := content[:n]
					if n > covered && file == checkpointName {
						continue
					}
					// The signatures of others cut off; a log that ended earlier.
					whole := n >= covered || boundary[n]
					all = append(all, tampering{fmt.Sprintf("%s cut to %d bytes", file, n), file, &text, whole})
					cuts++
				}
				if file == checkpointName {
					// A checkpoint without the signatures of others is one.
					all = slices.DeleteFunc(all, func(c tampering) bool { return c.content != nil && *c.content == content[:covered] })
				}
				longer := content + "x"
				all = append(all, tampering{file + " with a byte more", file, &longer, false},
					tampering{file + " removed", file, nil, file == cosignedName || file == journalName && name == "crashed"})
				if file == journalName && name == "closed" {
					all = all[:len(all)-1] // it holds nothing that the tiles do not
				}
			}
			tryAll(t, dir, kept, all)
			if flips < 6000 || cuts < 6000 || exempt > 300 {
				t.Errorf("%d bytes flipped, %d cuts, %d bytes exempt", flips, cuts, exempt)
			}
		})
	}
}

// lastOf is the newest checkpoint of a journal.
func lastOf(t *testing.T, raw string) []byte {
	t.Helper()
	j, err := parseJournal([]byte(raw), nil)
	if err != nil || len(j.records) == 0 {
		t.Fatal(err)
	}
	return j.records[len(j.records)-1].checkpoint
}

// recordBoundaries are the lengths at which a journal is whole.
func recordBoundaries(t *testing.T, file, content string) map[int]bool {
	if file != journalName {
		return nil
	}
	at := map[int]bool{}
	j, err := parseJournal([]byte(content), nil)
	if err != nil {
		t.Fatal(err)
	}
	end := len(journalMagic)
	for end < len(content) {
		payload, ok := unframe([]byte(content[end:]))
		if !ok {
			t.Fatal("a record that is not whole")
		}
		end += frameHeader + len(payload)
		at[end] = true
	}
	if len(at) != len(j.records)+1 {
		t.Fatalf("%d boundaries, %d records", len(at), len(j.records))
	}
	return at
}

// Each entry changed, dropped, repeated and put elsewhere, each two exchanged, each end cut off: in
// the bundle, and in bundle and tile alike. Each record of the journal likewise.
func TestEveryEntryOf50(t *testing.T) {
	logs := exhaustiveLogs(t)
	dir := logs["closed"]
	content := contents(t, dir)
	const n = 50
	entries, err := splitBundle([]byte(content["tile/entries/000.p/50"]), 50)
	if err != nil || len(entries) != n {
		t.Fatalf("%d entries, %v", len(entries), err)
	}
	type shape struct {
		what  string
		order []int
	}
	var shapes []shape
	add := func(what string, order []int) { shapes = append(shapes, shape{what, order}) }
	in := slices.Collect(func(yield func(int) bool) {
		for i := range n {
			if !yield(i) {
				return
			}
		}
	})
	for i := range n {
		// Its number stays, so the root alone tells.
		entries = append(entries, bytes.Replace(entries[i], []byte("2023"), []byte("2024"), 1))
		changed := slices.Clone(in)
		changed[i] = n + i
		add(fmt.Sprintf("entry %d changed", i), changed)
		add(fmt.Sprintf("entry %d dropped", i), slices.Delete(slices.Clone(in), i, i+1))
		add(fmt.Sprintf("entry %d repeated", i), slices.Insert(slices.Clone(in), i, i))
		add(fmt.Sprintf("cut before entry %d", i), in[:i])
		for j := range i {
			swapped := slices.Clone(in)
			swapped[i], swapped[j] = j, i
			add(fmt.Sprintf("entries %d and %d exchanged", j, i), swapped)
		}
	}
	var bundles, both []tampering
	tileOf := map[string]string{}
	for _, s := range shapes {
		var bundle, tile []byte
		for _, i := range s.order {
			h := tlog.RecordHash(entries[i])
			bundle, tile = appendBundle(bundle, entries[i]), append(tile, h[:]...)
		}
		text := string(bundle)
		tileOf[s.what+", tile too"] = string(tile)
		bundles = append(bundles, tampering{s.what, "tile/entries/000.p/50", &text, false})
		both = append(both, tampering{s.what + ", tile too", "tile/entries/000.p/50", &text, false})
	}
	tryAll(t, dir, nil, bundles)
	at := filepath.Join(t.TempDir(), "both")
	copyDir(t, dir, at)
	for _, c := range both {
		write(t, filepath.Join(at, c.file), *c.content)
		write(t, filepath.Join(at, "tile/0/000.p/50"), tileOf[c.what])
		detected(t, at, c.what)
	}
	if len(shapes) != 4*n+n*(n-1)/2 {
		t.Errorf("%d shapes", len(shapes))
	}

	// The journal's five records: each subset, each order of two.
	crashed := logs["crashed"]
	raw := contents(t, crashed)[journalName]
	j, err := parseJournal([]byte(raw), nil)
	if err != nil || len(j.records) != 5 {
		t.Fatalf("%d records, %v", len(j.records), err)
	}
	start, err := journalStart(base{Checkpoint: string(j.note), Open: j.open})
	if err != nil {
		t.Fatal(err)
	}
	build := func(order ...int) *string {
		text := bytes.Clone(start)
		for _, i := range order {
			var bundle []byte
			for _, e := range j.records[i].entries {
				bundle = appendBundle(bundle, e)
			}
			text = append(text, journalRecord(j.records[i].checkpoint, bundle)...)
		}
		s := string(text)
		return &s
	}
	if *build(0, 1, 2, 3, 4) != raw {
		t.Fatal("the journal cannot be built again")
	}
	var records []tampering
	for i := range 5 {
		rest := slices.Delete([]int{0, 1, 2, 3, 4}, i, i+1)
		records = append(records, tampering{fmt.Sprintf("record %d dropped", i), journalName, build(rest...), i == 4})
		for k := range i {
			swapped := []int{0, 1, 2, 3, 4}
			swapped[i], swapped[k] = k, i
			records = append(records, tampering{fmt.Sprintf("records %d and %d exchanged", k, i), journalName, build(swapped...), false})
		}
	}
	tryAll(t, crashed, lastOf(t, raw), records)
}

// Random changes, several at once, of logs of any size: none is missed. A checkpoint is
// kept, so that an older state of the log counts as a change too.
func TestRandomTampering(t *testing.T) {
	rounds := 400
	if os.Getenv("CAL_LONG") != "" {
		rounds = 6000
	}
	seed := uint64(time.Now().UnixNano())
	rnd := rand.New(rand.NewPCG(seed, 0))
	type made struct {
		dir     string
		kept    []byte
		content map[string]string
		size    int64
	}
	var logs []made
	for _, n := range []int{3, 255, 300, 517, 1100} {
		l := mustOpen(t, filepath.Join(t.TempDir(), "log"), testOptions())
		for i := range n {
			if i == n*2/3 {
				mustKeep(t, l)
			}
			if _, err := l.Append(nucleus.Entry{Kind: "log.x", Pod: fmt.Sprintf("p-%d", n), Session: fmt.Sprint(i)}); err != nil {
				t.Fatal(err)
			}
		}
		if rnd.IntN(2) == 0 {
			mustKeep(t, l)
		}
		dir := filepath.Join(t.TempDir(), "copy")
		copyDir(t, l.dir, dir) // as a crash would leave it
		logs = append(logs, made{dir, l.Checkpoint(), contents(t, dir), int64(n)})
		l.Close()
		wantOK(t, dir, logs[len(logs)-1].kept, int64(n))
	}
	for round := range rounds {
		m, other := logs[rnd.IntN(len(logs))], logs[rnd.IntN(len(logs))]
		now := maps.Clone(m.content)
		delete(now, lockName)
		var what []string
		for range 1 + rnd.IntN(3) {
			names := slices.Sorted(maps.Keys(now))
			if len(names) == 0 {
				break
			}
			file := names[rnd.IntN(len(names))]
			text := []byte(now[file])
			switch how := rnd.IntN(7); {
			case how == 0:
				delete(now, file)
				what = append(what, "remove "+file)
				continue
			case how == 1 && len(text) > 0:
				text = text[:rnd.IntN(len(text))]
			case how == 2 && len(text) > 1:
				from := rnd.IntN(len(text) - 1)
				text = slices.Delete(text, from, from+1+rnd.IntN(len(text)-from-1))
			case how == 3:
				from := names[rnd.IntN(len(names))]
				text = []byte(now[from])
				what = append(what, "from "+from)
			case how == 4 && other.content[file] != "":
				text = []byte(other.content[file])
				what = append(what, fmt.Sprintf("from the log of %d", other.size))
			case how == 5:
				text = slices.Insert(text, rnd.IntN(len(text)+1), byte(rnd.IntN(256)))
			case len(text) > 0:
				text[rnd.IntN(len(text))] ^= byte(1 + rnd.IntN(255))
			}
			now[file] = string(text)
			what = append(what, "change "+file)
		}
		if same(t, m.content, now) {
			continue
		}
		for file, text := range now {
			if text != m.content[file] {
				write(t, filepath.Join(m.dir, file), text)
			}
		}
		for file := range m.content {
			if _, ok := now[file]; !ok && file != lockName {
				os.Remove(filepath.Join(m.dir, file))
			}
		}
		r, err := verify(m.dir, VerifyOptions{Key: testVerifier, Checkpoint: m.kept, Witnesses: []string{testWitnessKey}}, 0)
		if err == nil && r.OK() {
			t.Errorf("seed %d, round %d, %d entries: not detected: %v", seed, round, m.size, what)
		}
		for file, text := range m.content {
			if now[file] != text {
				write(t, filepath.Join(m.dir, file), text)
			}
		}
	}
	for _, m := range logs {
		wantOK(t, m.dir, m.kept, m.size)
	}
}

// same is true where nothing differs that Verify vouches for: see notCovered. A journal
// that is gone is no loss where the tiles hold every entry.
func same(t *testing.T, a, b map[string]string) bool {
	t.Helper()
	j, err := parseJournal([]byte(a[journalName]), nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, ok := b[journalName]; !ok && len(j.records) == 0 {
		b = maps.Clone(b)
		b[journalName] = a[journalName]
	}
	strip := func(all map[string]string) map[string]string {
		all = maps.Clone(all)
		delete(all, lockName)
		if text := all[checkpointName]; strings.Contains(text, "\n\n") && len(text) > afterOwnSignature(text) {
			all[checkpointName] = text[:afterOwnSignature(text)]
		}
		return all
	}
	return maps.Equal(strip(a), strip(b))
}
