package audit

import (
	"bytes"
	"crypto/ed25519"
	"encoding/base64"
	"encoding/hex"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"
)

// A cosignature, byte for byte. Key id and signature were computed again with hashlib
// and OpenSSL.
func TestCosignVector(t *testing.T) {
	const signed = "example.com/log\n3\nWqx3HImawpLnS/Gv4ubjAvi1WIOy0b8Ze0amvqbavKk=\n\n" +
		"— example.com/log P/7fCSJCAg0YlW64YCvDrjUnb9Cq9yIeMfhOs1TlbkBKdNDIBYdzb5J8JbFuS6Wwq/qR7szFV73vI78YoQjG+bhtZQQ=\n"
	line, err := Cosign([]byte(signed), "witness.example/w1", newKey(2), time.Unix(1700000000, 0))
	if err != nil {
		t.Fatal(err)
	}
	if string(line) != cosignedLine {
		t.Errorf("got\n%s\nwant\n%s", line, cosignedLine)
	}
	if key := WitnessKey("witness.example/w1", newKey(2).Public().(ed25519.PublicKey)); key != cosignerKey {
		t.Errorf("witness key %s, want %s", key, cosignerKey)
	}
	said, err := cosigned([]byte(signed+cosignedLine), cosignerKey)
	if err != nil || said != (Witnessed{"witness.example/w1", 1700000000}) {
		t.Errorf("%v, %v", said, err)
	}
}

func TestCosignaturesRefuse(t *testing.T) {
	dir := makeLog(t, 3)
	signed := []byte(contents(t, dir)[checkpointName])
	line, err := Cosign(signed, "w.test", testWitness, time.Unix(1700000000, 0))
	if err != nil {
		t.Fatal(err)
	}
	sig, err := base64.StdEncoding.DecodeString(strings.Fields(string(line))[2])
	if err != nil || len(sig) != 4+8+64 {
		t.Fatalf("%d bytes, %v", len(sig), err)
	}
	with := func(change func(sig []byte) []byte) []byte {
		return []byte("— w.test " + base64.StdEncoding.EncodeToString(change(bytes.Clone(sig))) + "\n")
	}
	flip := func(i int) []byte { return with(func(s []byte) []byte { s[i] ^= 1; return s }) }
	other, err := Cosign([]byte(contents(t, makeLog(t, 4))[checkpointName]), "w.test", testWitness, time.Unix(1700000000, 0))
	if err != nil {
		t.Fatal(err)
	}
	for name, line := range map[string][]byte{
		"of another checkpoint": other, "none": nil, "of the log's key": []byte(strings.SplitN(string(signed), "\n\n", 2)[1]),
		"its id": flip(0), "its time": flip(11), "its signature": flip(40),
		"a time beyond 63 bits": with(func(s []byte) []byte { s[4] |= 0x80; return s }),
		"without time":          with(func(s []byte) []byte { return slices.Delete(s, 4, 12) }),
		"longer":                with(func(s []byte) []byte { return append(s, 0) }),
		"not base64":            []byte("— w.test !!!!\n"), "cut": line[:len(line)-1], "twice a line break": append(bytes.Clone(line), '\n'),
		"other last bits": []byte(strings.Replace(string(line), "=\n", "\n", 1)),
	} {
		if got, err := AddCosignature(signed, line, testWitnessKey); err == nil {
			t.Errorf("%s: %s", name, got)
		}
	}
	if _, err := AddCosignature(signed, line, testWitnessKey); err != nil { // the control
		t.Error(err)
	}
	for name, key := range map[string]string{"none": "", "of a log": testVerifier, "another hash": strings.Replace(testWitnessKey, "+", "+0", 1),
		"cut": testWitnessKey[:len(testWitnessKey)-4], "private": "PRIVATE+KEY+w+00000000+AAAA"} {
		if _, err := AddCosignature(signed, line, key); err == nil || !strings.Contains(err.Error(), "witness key") {
			t.Errorf("the key %s: %v", name, err)
		}
	}
	if _, err := Cosign([]byte("no checkpoint"), "w.test", testWitness, time.Unix(1, 0)); err == nil {
		t.Error("cosigned what is no note")
	}
	if _, err := Cosign(signed, "w w", testWitness, time.Unix(1, 0)); err == nil {
		t.Error("cosigned by a name with a space")
	}
	if _, err := Cosign(signed, "w.test", testWitness, time.Time{}); err == nil {
		t.Error("cosigned before 1970")
	}
}

// Each proof between two published sizes holds by x/mod's check, and no other does.
func TestConsistency(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "log")
	l := mustOpen(t, dir, testOptions())
	defer l.Close()
	roots := map[int64]tlog.Hash{0: l.Root()}
	sizes := []int64{0, 1, 2, 3, 255, 256, 257, 300, 511, 512, 513, 700}
	at := int64(0)
	for _, size := range sizes[1:] {
		appendEntries(t, l, int(at), int(size-at))
		roots[size], at = l.Root(), size
	}
	if err := l.Publish(); err != nil {
		t.Fatal(err)
	}
	appendEntries(t, l, int(at), 5)
	for _, size := range sizes {
		for _, old := range sizes {
			proof, err := l.Consistency(old, size)
			if old > size {
				if err == nil {
					t.Errorf("%d to %d: %v", old, size, proof)
				}
				continue
			}
			if err != nil {
				t.Fatalf("%d to %d: %v", old, size, err)
			}
			if old == 0 || old == size {
				if len(proof) > 0 {
					t.Errorf("%d to %d: %v", old, size, proof)
				}
				continue
			}
			if err := tlog.CheckTree(proof, size, roots[size], old, roots[old]); err != nil {
				t.Errorf("%d to %d: %v", old, size, err)
			}
			for i := range proof {
				proof[i][7] ^= 1
				if tlog.CheckTree(proof, size, roots[size], old, roots[old]) == nil {
					t.Errorf("%d to %d: hash %d does not matter", old, size, i)
				}
				proof[i][7] ^= 1
			}
		}
	}
	for _, c := range [][2]int64{{-1, 3}, {0, 701}, {700, 705}} {
		if _, err := l.Consistency(c[0], c[1]); err == nil || !strings.Contains(err.Error(), "700 are published") {
			t.Errorf("%d to %d: %v", c[0], c[1], err)
		}
	}
	// A tile that was changed gives no proof.
	if err := flipIn("tile/0/000", 5)(dir); err != nil {
		t.Fatal(err)
	}
	if proof, err := l.Consistency(3, 700); err == nil {
		t.Errorf("from a changed tile: %v", proof)
	}
}

// What witnesses cosigned stays in the directory, never goes back, and binds the log: one
// that does not hold it is neither opened nor verified.
func TestKeep(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "log")
	l := mustOpen(t, dir, testOptions())
	appendEntries(t, l, 0, 300)
	first := mustKeep(t, l)
	if got := contents(t, dir); got[cosignedName] != string(first) || got[checkpointName] != string(first) {
		t.Fatalf("kept\n%s\npublic\n%s\nwant\n%s", got[cosignedName], got[checkpointName], first)
	}
	appendEntries(t, l, 300, 7)
	if err := l.Publish(); err != nil {
		t.Fatal(err)
	}
	early := filepath.Join(t.TempDir(), "early")
	copyDir(t, dir, early)
	if err := l.Keep(first); err != nil { // a fresher signature of the same tree
		t.Error(err)
	}
	if got := contents(t, dir)[checkpointName]; strings.Contains(got, "w.test") {
		t.Errorf("the older cosignature is under the newer checkpoint:\n%s", got)
	}
	second := mustKeep(t, l)
	long := mustOpen(t, filepath.Join(t.TempDir(), "long"), testOptions())
	appendEntries(t, long, 0, 400)
	longer := mustKeep(t, long)
	long.Close()
	foreign, err := newSigner(testOrigin, newKey(9))
	if err != nil {
		t.Fatal(err)
	}
	unsigned, err := foreign.checkpoint(&tree{})
	if err != nil {
		t.Fatal(err)
	}
	s, err := newSigner(testOrigin, testKey)
	if err != nil {
		t.Fatal(err)
	}
	forked := &tree{}
	for range 307 {
		forked.add(tlog.Hash{})
	}
	fork, err := s.checkpoint(forked)
	if err != nil {
		t.Fatal(err)
	}
	before := contents(t, dir)
	for name, c := range map[string]struct {
		signed []byte
		want   string
	}{
		"older": {first, "want 307 to 307"}, "longer than the log": {longer, "want 307 to 307"}, "another key's": {unsigned, "bad signature"},
		"a fork": {fork, "has root"}, "noise": {[]byte("noise"), "not a checkpoint"},
	} {
		if err := l.Keep(c.signed); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", name, err, c.want)
		}
	}
	if !maps.Equal(before, contents(t, dir)) {
		t.Error("what was refused was written")
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	r := wantOK(t, dir, nil, 307)
	if r.Cosigned != 307 || len(r.Cosignatures) != 0 {
		t.Errorf("%+v", r)
	}
	r, err = Verify(dir, VerifyOptions{Key: testVerifier, Witnesses: []string{testWitnessKey}})
	if err != nil || !r.OK() || !slices.Equal(r.Cosignatures, []Witnessed{{"w.test", 1700000000}}) {
		t.Errorf("%+v, %v", r, err)
	}

	// An older state of the log beside the newer cosigned checkpoint.
	wantOK(t, early, nil, 307)
	shorter := makeLog(t, 300)
	for name, c := range map[string]struct {
		signed []byte
		kind   ProblemKind
		open   string
	}{
		"cut back": {second, Truncated, "truncated"}, "signed by another": {unsigned, BadSignature, "bad signature"}, "noise": {[]byte("noise"), Changed, "not a checkpoint"},
	} {
		at := filepath.Join(t.TempDir(), "at")
		copyDir(t, shorter, at)
		write(t, filepath.Join(at, cosignedName), string(c.signed))
		r := mustVerify(t, at, nil)
		if len(r.Problems) != 1 || r.Problems[0].Kind != c.kind || r.Problems[0].File != cosignedName {
			t.Errorf("%s: %v, want %q", name, r.Problems, c.kind)
		}
		before := contents(t, at)
		if l, err := Open(at, testOptions()); err == nil || !strings.Contains(err.Error(), c.open) {
			t.Errorf("%s: opened, %v", name, err)
			if err == nil {
				l.Close()
			}
		}
		if !maps.Equal(before, contents(t, at)) {
			t.Errorf("%s: the refused open wrote", name)
		}
	}
	for _, size := range []int{100, 307} { // below the journal's base, and at it
		tr := &tree{}
		for range size {
			tr.add(tlog.Hash{})
		}
		fork, err := s.checkpoint(tr)
		if err != nil {
			t.Fatal(err)
		}
		at := filepath.Join(t.TempDir(), "at")
		copyDir(t, dir, at)
		write(t, filepath.Join(at, cosignedName), string(fork))
		r := mustVerify(t, at, nil)
		if len(r.Problems) != 1 || r.Problems[0].Kind != Fork || r.Problems[0].File != cosignedName {
			t.Errorf("a fork of %d: %v", size, r.Problems)
		}
		if l, err := Open(at, testOptions()); err == nil || !strings.Contains(err.Error(), "has root") {
			t.Errorf("a fork of %d: opened, %v", size, err)
			if err == nil {
				l.Close()
			}
		}
	}
	// Whoever names a witness wants its word.
	if err := os.Remove(filepath.Join(dir, cosignedName)); err != nil {
		t.Fatal(err)
	}
	r, err = Verify(dir, VerifyOptions{Key: testVerifier, Witnesses: []string{testWitnessKey}})
	if err != nil || len(r.Problems) != 1 || r.Problems[0].Kind != Missing {
		t.Errorf("%+v, %v", r, err)
	}
	if _, err := Verify(dir, VerifyOptions{Key: testVerifier, Witnesses: []string{testVerifier}}); err == nil || !strings.Contains(err.Error(), "witness key") {
		t.Error(err)
	}
}

// The vectors of RFC 6962's reference implementation: roots of the first leaves, and
// proofs between them.
func TestReferenceVectors(t *testing.T) {
	leaves := []string{"", "00", "10", "2021", "3031", "40414243", "5051525354555657", "606162636465666768696a6b6c6d6e6f"}
	roots := []string{
		"6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
		"fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
		"aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
		"d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
		"4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
		"76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
		"ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
		"5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
	}
	if hex.EncodeToString(EmptyRoot[:]) != "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855" {
		t.Errorf("the root of nothing is %x", EmptyRoot)
	}
	tr := &tree{}
	for i, leaf := range leaves {
		raw, err := hex.DecodeString(leaf)
		if err != nil {
			t.Fatal(err)
		}
		tr.add(tlog.RecordHash(raw))
		if root := tr.root(); hex.EncodeToString(root[:]) != roots[i] {
			t.Errorf("%d leaves: root %x, want %s", i+1, root, roots[i])
		}
	}
	if data := tr.tile(tlog.Tile{H: 8, L: 0, N: 0, W: 8}); len(data) != 8*32 || hex.EncodeToString(data[:32]) != roots[0] {
		t.Errorf("tile %x", data)
	}
}

// The example of x/mod's note package: a note of others, signed, and no checkpoint.
func TestForeignNotes(t *testing.T) {
	const (
		key  = "PeterNeumann+c74f20a3+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW"
		text = "If you think cryptography is the answer to your problem,\nthen you don't know what your problem is.\n"
		sig  = "— PeterNeumann x08go/ZJkuBS9UG/SffcvIAQxVBtiFupLLr8pAcElZInNIuGUgYN1FFYC2pZSNXgKvqfqdngotpRZb6KE6RyyBwJnAM=\n"
	)
	v, err := note.NewVerifier(key)
	if err != nil {
		t.Fatal(err)
	}
	if n, err := note.Open([]byte(text+"\n"+sig), note.VerifierList(v)); err != nil || n.Text != text {
		t.Fatalf("the vector itself: %v", err)
	}
	if err := CheckKey(key); err != nil {
		t.Error(err)
	}
	if cp, err := ParseCheckpoint([]byte(text+"\n"+sig), key); err == nil || !strings.Contains(err.Error(), "not a checkpoint") {
		t.Errorf("%+v, %v", cp, err)
	}
}

// The witness of the vector.
const (
	cosignedLine = "— witness.example/w1 6Two1gAAAABlU/EA9BNDJ7zkAyceng33mutSkVKDefTSeu1i546MukxiwxabFTThz0F8pE79VktTb6HB65tf0jrkuIlsUVxgq4GuDQ==\n"
	cosignerKey  = "witness.example/w1+e93c28d6+BHQiuYh1mAaOMsREipSa2ykND041ueAbDuXxoeYA/iZ0"
)
