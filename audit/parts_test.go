package audit

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"cal/internal/redact"
	"cal/nucleus"

	"golang.org/x/mod/sumdb/tlog"
)

// The tree against x/mod's, and against itself loaded from tiles.
func TestTree(t *testing.T) {
	var stored []tlog.Hash
	reader := tlog.HashReaderFunc(func(indexes []int64) ([]tlog.Hash, error) {
		out := make([]tlog.Hash, len(indexes))
		for i, x := range indexes {
			out[i] = stored[x]
		}
		return out, nil
	})
	tr := &tree{}
	if tr.root() != sha256.Sum256(nil) {
		t.Fatal("the root of no leaves is the hash of nothing (RFC 6962, 2.1)")
	}
	for n := int64(0); n < 66000; n++ {
		h := tlog.RecordHash(fmt.Appendf(nil, "leaf %d", n))
		hashes, err := tlog.StoredHashesForRecordHash(n, h, reader)
		if err != nil {
			t.Fatal(err)
		}
		stored = append(stored, hashes...)
		tr.add(h)
		if size := n + 1; size < 600 || size%4093 == 0 || size > 65530 && size < 65545 {
			checkTree(t, tr, reader)
		}
	}
}

func checkTree(t *testing.T, tr *tree, reader tlog.HashReader) {
	t.Helper()
	want, err := tlog.TreeHash(tr.size, reader)
	if err != nil || tr.root() != want {
		t.Fatalf("%d leaves: root %s, want %s (%v)", tr.size, tr.root(), want, err)
	}
	for _, at := range tlog.NewTiles(tileHeight, max(0, tr.size-300), tr.size) {
		want, err := tlog.ReadTileData(at, reader)
		if err != nil || !bytes.Equal(tr.tile(at), want) {
			t.Fatalf("%d leaves: %s is not as x/mod has it (%v)", tr.size, tilePath(at), err)
		}
	}
	loaded, err := loadTree(tr.size, func(at tlog.Tile) ([]byte, error) { return tlog.ReadTileData(at, reader) })
	if err != nil || loaded.root() != want {
		t.Fatalf("%d leaves: loaded root %s, want %s (%v)", tr.size, loaded.root(), want, err)
	}
	// What is loaded goes on as the original does.
	next := tr.clone()
	for i := range 300 {
		h := tlog.RecordHash([]byte{byte(i)})
		loaded.add(h)
		next.add(h)
	}
	loaded.forget(tr.size)
	if loaded.root() != next.root() {
		t.Fatalf("%d leaves: trees part after 300 more", tr.size)
	}
	for _, at := range tlog.NewTiles(tileHeight, tr.size, next.size) {
		if !bytes.Equal(loaded.tile(at), next.tile(at)) {
			t.Fatalf("%d leaves: %s differs after 300 more", tr.size, tilePath(at))
		}
	}
}

// The examples of the C2SP specification.
func TestTilePaths(t *testing.T) {
	for want, at := range map[string]tlog.Tile{
		"tile/0/x001/x234/067":       {H: 8, L: 0, N: 1234067, W: 256},
		"tile/0/x001/x234/067.p/1":   {H: 8, L: 0, N: 1234067, W: 1},
		"tile/entries/x001/x234/067": {H: 8, L: entriesLevel, N: 1234067, W: 256},
		"tile/entries/000.p/255":     {H: 8, L: entriesLevel, N: 0, W: 255},
		"tile/63/000":                {H: 8, L: 63, N: 0, W: 256},
	} {
		if got := tilePath(at); got != want {
			t.Errorf("%+v: %s, want %s", at, got, want)
		}
		if got, err := parseTilePath(want); err != nil || got != at {
			t.Errorf("%s: %+v, %v, want %+v", want, got, err, at)
		}
	}
	for _, bad := range []string{"", "tile", "tile/0/000.p/256", "tile/0/000.p/0", "tile/data/000", "tile/8/0/000", "tile/-1/000", "tile/0/0", "tile/0/001/002", "x/0/000", "tile/0/000.p/01"} {
		if at, err := parseTilePath(bad); err == nil {
			t.Errorf("%s: %+v, want an error", bad, at)
		}
	}
	// A tree of 70,000 has 273 full tiles, partial ones of 112, 17 and 1.
	widths := map[int]int{0: 112, 1: 17, 2: 1}
	for level, want := range widths {
		if at, ok := partial(level, 70000); !ok || at.W != want {
			t.Errorf("level %d: width %d, want %d", level, at.W, want)
		}
	}
}

// A checkpoint, byte for byte: another implementation must write the same.
func TestCheckpointVector(t *testing.T) {
	s, err := newSigner("example.com/log", newKey(1))
	if err != nil {
		t.Fatal(err)
	}
	tr := &tree{}
	for _, leaf := range []string{"one", "two", "three"} {
		tr.add(tlog.RecordHash([]byte(leaf)))
	}
	got, err := s.checkpoint(tr)
	if err != nil {
		t.Fatal(err)
	}
	// Root, key id and signature were computed again with hashlib and OpenSSL.
	const want = "example.com/log\n3\nWqx3HImawpLnS/Gv4ubjAvi1WIOy0b8Ze0amvqbavKk=\n\n" +
		"— example.com/log P/7fCSJCAg0YlW64YCvDrjUnb9Cq9yIeMfhOs1TlbkBKdNDIBYdzb5J8JbFuS6Wwq/qR7szFV73vI78YoQjG+bhtZQQ=\n"
	if string(got) != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
	if key, want := verifierOf(s), "example.com/log+3ffedf09+AUy1q/atefv1q7zK/MJp2FzSZR7UuIW1hp8kGu3wpbop"; key != want {
		t.Errorf("verifier key %s, want %s", key, want)
	}
}

func TestParseCheckpointRefuses(t *testing.T) {
	root := tlog.Hash{}.String()
	for _, body := range []string{
		"", "o\n", "o\n1\n", "o\n01\n" + root + "\n", "o\n-1\n" + root + "\n", "o\n+1\n" + root + "\n",
		"o\n1 \n" + root + "\n", "o\n9223372036854775808\n" + root + "\n", "\n1\n" + root + "\n",
		"o\n1\n" + root[1:] + "\n", "o\n1\n" + root + "=\n", "go.sum database tree\n",
	} {
		if cp, err := parseBody(body); err == nil {
			t.Errorf("%q: %+v, want an error", body, cp)
		}
	}
	if cp, err := parseBody("o\n1\n" + root + "\nan extension\n"); err != nil || cp.Size != 1 {
		t.Errorf("with an extension line: %+v, %v", cp, err)
	}
}

// look reads what a JSON decoder reads.
func TestLook(t *testing.T) {
	for _, e := range []nucleus.Entry{
		{Kind: "log.x"},
		{Seq: 1 << 40, Kind: nucleus.KindIntent, Permit: "p-1", Args: json.RawMessage(`{"seq":7,"kind":"log.y","permit":"no"}`)},
		{Seq: 3, Kind: nucleus.KindOutcome, Permit: "p", Rule: `"},{"seq":9,\`, Status: `\\"`, Data: json.RawMessage(`[[{"a":"]}"}],"seq",{"seq":1}]`)},
		{Seq: 4, Kind: "log.x", Pod: "ü\n\t\x00", Grants: []string{"a", `b"`}, Outcome: &nucleus.Signed{Payload: []byte("x")}},
	} {
		raw, err := encode(e)
		if err != nil {
			t.Fatal(err)
		}
		g, err := look(raw)
		if err != nil || g.seq != e.Seq || g.kind != e.Kind || g.permit != e.Permit {
			t.Errorf("%s: %+v, %v", raw, g, err)
		}
	}
	for _, bad := range []string{``, `{`, `{}`, `[]`, `null`, `{"kind":"x"}`, `{"seq":}`, `{"seq":1`, `{"seq":-1}`, `{"seq":"1"}`, `{"seq":1}}x`, `{"a"}`, `{"a:1}`, `{"seq":1,"a":[}`, `{"seq":1,"a":"\"}`} {
		if g, err := look([]byte(bad)); err == nil {
			t.Errorf("%s: %+v, want an error", bad, g)
		}
	}
}

func FuzzLook(f *testing.F) {
	f.Add([]byte(`{"kind":"log.x","seq":1,"a":{"b":["\"",1]}}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		g, err := look(raw)
		canonical, bad := nucleus.CanonicalJSON(raw)
		if bad != nil || !bytes.Equal(canonical, raw) {
			return // only what a log holds need be read right
		}
		var want struct {
			Seq *int64 `json:"seq"`
		}
		if json.Unmarshal(raw, &want) != nil || want.Seq == nil || *want.Seq < 0 || bytes.Contains(raw, []byte(`"SEQ`)) {
			return
		}
		if keys := (map[string]json.RawMessage{}); json.Unmarshal(raw, &keys) != nil || keys["seq"] == nil {
			return // encoding/json is lax about the case of keys
		} else if json.Unmarshal(keys["seq"], want.Seq) != nil {
			return
		}
		if err != nil || g.seq != *want.Seq {
			t.Errorf("%s: %+v, %v; want %d", raw, g, err, *want.Seq)
		}
	})
}

func FuzzParseJournal(f *testing.F) {
	start, err := journalStart(base{Checkpoint: "o\n0\n" + (tlog.Hash{}).String() + "\n\n", Open: []int64{}})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(start)
	f.Add(append(start, journalRecord([]byte("o\n1\n"+(tlog.Hash{}).String()+"\n\n"), appendBundle(nil, []byte("x")))...))
	f.Fuzz(func(t *testing.T, raw []byte) {
		j, err := parseJournal(raw, nil)
		if err != nil {
			return
		}
		if j.whole+len(j.tail) != len(raw) {
			t.Errorf("%d whole and %d torn of %d bytes", j.whole, len(j.tail), len(raw))
		}
	})
}

func TestShownRedacts(t *testing.T) {
	for in, want := range map[string]string{
		`{"path":"a.go","author":"x","tokenizer":"bpe","keyboard":"us","monkey":"m"}`: ``,
		`{"password":"hunter2","n":1}`:                                                              `{"n":1,"password":"[redacted]"}`,
		`{"apiKey":"a","API_KEY":"b","x-api-key":"c","OPENAI_API_KEY":"d"}`:                         `{"API_KEY":"[redacted]","OPENAI_API_KEY":"[redacted]","apiKey":"[redacted]","x-api-key":"[redacted]"}`,
		`{"headers":{"Authorization":"Bearer abc","Cookie":["a","b"]}}`:                             `{"headers":{"Authorization":"[redacted]","Cookie":"[redacted]"}}`,
		`{"secret":{"deep":["x"]}}`:                                                                 `{"secret":"[redacted]"}`,
		`{"max_tokens":100,"token":null,"secret":false,"password":""}`:                              ``,
		`{"argv":["curl","--token","abc","-H","Authorization: Bearer s3cr3t-value"]}`:               `{"argv":["curl","--token","[redacted]","-H","Authorization: [redacted]"]}`,
		`{"argv":["deploy","--password=hunter2","--verbose"]}`:                                      `{"argv":["deploy","--password=[redacted]","--verbose"]}`,
		`"push with ghp_0123456789abcdefghijABCDEFGHIJ012345 now"`:                                  `"push with [redacted] now"`,
		`"sk-ant-api03-abcdefghijklmnop"`:                                                           `"[redacted]"`,
		`"AKIAIOSFODNN7EXAMPLE"`:                                                                    `"[redacted]"`,
		`"https://user:pa55@example.com/x"`:                                                         `"https://[redacted]@example.com/x"`,
		`"DB_PASSWORD=hunter2 make"`:                                                                `"DB_PASSWORD=[redacted] make"`,
		`"eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.abcdefghi"`:                                          `"[redacted]"`,
		`"-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNz\n-----END OPENSSH PRIVATE KEY-----\nafter"`: `"[redacted]\nafter"`,
		`"-----BEGIN RSA PRIVATE KEY-----\ncut off"`:                                                `"[redacted]"`,
		`"3b8c1f0d9e7a6b5c4d3e2f1a0b9c8d7e6f5a4b3c"`:                                                ``, // a commit id is no secret
		`"{\"api_key\": \"abc\", n: 1}"`:                                                            `"{\"api_key\": [redacted], n: 1}"`,
	} {
		if want == "" {
			canonical, err := nucleus.CanonicalJSON([]byte(in))
			if err != nil {
				t.Fatal(err)
			}
			want = string(canonical)
		}
		got := Shown(json.RawMessage(in))
		if string(got) != want {
			t.Errorf("%s\n got %s\nwant %s", in, got, want)
		}
		if again := Shown(got); string(again) != string(got) {
			t.Errorf("%s: shown again: %s", got, again)
		}
	}
}

func TestShownCuts(t *testing.T) {
	many := map[string]string{}
	for i := range 5000 {
		many[fmt.Sprintf("key-%d", i)] = "value"
	}
	for name, v := range map[string]any{
		"a long text":     map[string]string{"content": strings.Repeat("x", 1<<20), "path": "a.go"},
		"a text of runes": strings.Repeat("ü☃", 5000),
		"quotes":          strings.Repeat(`"`, 4000),
		"a long list":     make([]int, 100000),
		"many texts":      strings.Split(strings.Repeat("some words ", 3000), " "),
		"many keys":       many,
		"a long key":      map[string]int{strings.Repeat("k", 9000): 1},
		"controls":        strings.Repeat("\x01", 3000),
		"a cut secret":    strings.Repeat("x", 4000) + " ghp_0123456789abcdefghijABCDEFGHIJ012345",
		"lists in a list": [][][]string{{{strings.Repeat("y", 9000)}}},
		"ten long texts":  strings.SplitAfter(strings.Repeat(strings.Repeat("z", 3000)+",", 10), ","),
	} {
		got := Shown(v)
		if len(got) > maxShown {
			t.Errorf("%s: %d bytes", name, len(got))
		}
		if !json.Valid(got) || !strings.Contains(string(got), cutMark) && name != "a cut secret" {
			t.Errorf("%s: %.200s", name, got)
		}
		if strings.Contains(string(got), "ghp_") {
			t.Errorf("%s: a secret is shown: %s", name, got)
		}
		if again := Shown(got); string(again) != string(got) {
			t.Errorf("%s: shown again:\n%s\n%s", name, got, again)
		}
	}
	for name, v := range map[string]any{"not JSON": json.RawMessage("{"), "a channel": make(chan int), "a huge integer": json.RawMessage("9007199254740993")} {
		if got := string(Shown(v)); !strings.HasPrefix(got, `"[not shown: `) {
			t.Errorf("%s: %s", name, got)
		}
	}
}

// Append redacts by itself: nobody can forget it.
func TestAppendRedacts(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "log")
	l := mustOpen(t, dir, testOptions())
	canary := "ghp_0123456789abcdefghijABCDEFGHIJ012345"
	if _, err := l.Append(nucleus.Entry{Kind: "log.x", Args: json.RawMessage(`{"argv":["git","push","https://x:` + canary + `@github.com/o/r"]}`)}); err != nil {
		t.Fatal(err)
	}
	if _, err := l.Append(nucleus.Entry{Kind: "log.x", Args: json.RawMessage(`"` + strings.Repeat("x", 10<<20) + `"`)}); err != nil {
		t.Fatal(err)
	}
	l.Close()
	for name, content := range contents(t, dir) {
		if strings.Contains(content, canary) || len(content) > 20000 {
			t.Errorf("%s holds the secret or %d bytes", name, len(content))
		}
	}
}

func TestSalts(t *testing.T) {
	name := filepath.Join(t.TempDir(), "log.salts")
	s, err := OpenSalts(name)
	if err != nil {
		t.Fatal(err)
	}
	a, b := nucleus.NewSalt(), nucleus.NewSalt()
	for id, salt := range map[string]nucleus.Salt{"r-1": a, "r-10": b} {
		if err := s.Put(id, salt); err != nil {
			t.Fatal(err)
		}
	}
	digests := []string{nucleus.SHA256(nil), nucleus.SHA256([]byte("x"))}
	if err := s.Put("r-left", a, digests...); err != nil {
		t.Fatal(err)
	}
	if got, left, err := FindSalt(name, "r-left"); err != nil || got != a || !slices.Equal(left, digests) {
		t.Errorf("got %x %v, %v", got, left, err)
	}
	for _, bad := range []string{"xyz", digests[0] + " ", digests[0] + "\nr-1 " + digests[1], digests[0][2:]} {
		if err := s.Put("r-bad", a, digests[0], bad); err == nil {
			t.Errorf("kept the digest %q", bad)
		}
	}
	for _, bad := range []string{"", "a b", "a\nb"} {
		if err := s.Put(bad, a); err == nil {
			t.Errorf("took the id %q", bad)
		}
	}
	want := func(id string, salt nucleus.Salt) {
		t.Helper()
		if got, left, err := FindSalt(name, id); err != nil || got != salt || len(left) > 0 {
			t.Errorf("%s: %x, %v, %v", id, got, left, err)
		}
	}
	want("r-1", a) // while it is open
	want("r-10", b)
	if _, _, err := FindSalt(name, "r-2"); !errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), "r-2") {
		t.Errorf("%v, want ErrNotExist that names the request", err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	// A torn line spoils itself alone.
	content, _ := os.ReadFile(name)
	write(t, name, string(content)+"r-cut "+digests[0]+" "+digests[1][:20]+"\nr-3 abcdef")
	if s, err = OpenSalts(name); err != nil {
		t.Fatal(err)
	}
	if err := s.Put("r-4", b); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	want("r-1", a)
	want("r-4", b)
	if _, _, err := FindSalt(name, "r-3"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the torn one: %v", err)
	}
	if _, _, err := FindSalt(name, "r-cut"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the one whose digests are cut: %v", err)
	}
	if info, err := os.Stat(name); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
	if err := os.Chmod(name, 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := OpenSalts(name); err == nil || !strings.Contains(err.Error(), "0600") {
		t.Errorf("readable by others: %v", err)
	}
	link := filepath.Join(filepath.Dir(name), "link")
	if err := os.Symlink(name, link); err != nil {
		t.Fatal(err)
	}
	if _, err := OpenSalts(link); err == nil {
		t.Error("followed a link")
	}
}

// The entries show what agents did: nobody else reads them.
func TestFilesArePrivate(t *testing.T) {
	dir := makeLog(t, 300)
	err := filepath.WalkDir(dir, func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err == nil && info.Mode().Perm()&0o077 != 0 {
			t.Errorf("%s: mode %v", name, info.Mode())
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

// What the kind of an entry adds is redacted too, for every kind, and what is signed or bound by a
// digest stays as it is.
func TestDataIsRedacted(t *testing.T) {
	const token = "ghp_0123456789abcdefghijABCDEFGHIJ012345"
	dir := filepath.Join(t.TempDir(), "log")
	l := mustOpen(t, dir, testOptions())
	entries := map[string]string{
		nucleus.KindSessionStart:  `{"argv":["agent","-p","log in with ` + token + ` and PASSWORD=hunter2correct","--token","hunter2correct"],"tty":true}`,
		nucleus.KindIntent:        `{"kind":"invalid","message":"no program ` + token + `"}`,
		nucleus.KindOutcome:       `{"message":"open https://ada:hunter2correct@h/x: refused"}`,
		nucleus.KindApprovalDeny:  `{"reason":"the password=hunter2correct stands in it"}`,
		nucleus.KindPodFail:       `{"reason":"curl -u ada:hunter2correct x: exit code 1"}`,
		nucleus.KindSessionEnd:    `{"error":{"kind":"failed","message":"` + token + `"}}`,
		nucleus.KindSessionRefuse: `{"error":{"message":"Authorization: Basic hunter2correct"},"start":4}`,
		nucleus.KindApprovalUse:   `{"token":"hunter2correct","tokens":["x"]}`,
		"log.unknown":             `{"token":"hunter2correct","keys":{"password":"hunter2correct"}}`,
		"log.text":                `"` + token + `"`,
		"log.list":                `["` + token + `",7]`,
	}
	for kind, data := range entries {
		e, err := l.Append(nucleus.Entry{Kind: kind, Data: json.RawMessage(data)})
		if err != nil {
			t.Fatal(err)
		}
		if shown := string(e.Data); strings.Contains(shown, token) || strings.Contains(shown, "hunter2correct") || !strings.Contains(shown, redact.Mark) {
			t.Errorf("%s: %s", kind, shown)
		}
	}
	random := make([]byte, 64)
	rand.Read(random)
	key, sig := base64.StdEncoding.EncodeToString(random[:32]), base64.StdEncoding.EncodeToString(random)
	for kind, data := range map[string]string{
		nucleus.KindPodStart:    `{"approvers":[{"key":"` + key + `","kind":"ed25519","name":"ada"}],"boot":"b-CQMGAV7EV7IW6BJKK4YWJ7WRPH","outcome_key":"` + key + `","policy_sha256":"` + nucleus.SHA256(random) + `"}`,
		nucleus.KindKeyLoad:     `{"keys":{"log":{"algorithm":"ed25519","public":"` + key + `"}},"version":"1"}`,
		nucleus.KindKeyNew:      `{"key":"` + key + `","kind":"ed25519","name":"ada"}`,
		nucleus.KindKeyRemove:   `{"key":"` + key + `","kind":"ed25519","name":"ada"}`,
		nucleus.KindPolicyLoad:  `{"bytes":70,"policy":{"commands":["curl -u ada:hunter2correct x"],"password":"` + token + `"},"policy_sha256":"` + nucleus.SHA256(random) + `"}`,
		nucleus.KindApprovalUse: `{"approvers":["ada"],"n":1,"of":1,"tokens":["v4.public.` + sig + `"]}`,
		nucleus.KindLogFork:     `{"kept":"cal/node-log\n3\n` + key + `\n\n— cal/node-log ` + sig + `\n","origin":"cal/node-log","signed":"cal/node-log\n3\n` + key + `\n\n— cal/node-log ` + sig + `\n","why":"two roots"}`,
		nucleus.KindLogForget:   `{"checkpoint":"cal/node-log\n3\n` + key + `\n\n— cal/node-log ` + sig + `\n","key":"cal/node-log+3fb7df09+` + key + `","origin":"cal/node-log","witness":"authority+00000000+` + key + `"}`,
		nucleus.KindModelCall:   `{"done":true,"left":{"tokens":12.5,"usd":0.1},"tokens":{"input":12,"output":9007199254740991},"usd":1e-7}`,
		nucleus.KindRepoFetch:   `{"base":"` + nucleus.SHA256(random)[:40] + `","branch":"agent/fix-token","head":"` + nucleus.SHA256(random)[:40] + `","repo":"a","worktree":"/home/ada/src/CAL2Project/worktrees/fixToken3"}`,
	} {
		e, err := l.Append(nucleus.Entry{Kind: kind, Data: json.RawMessage(data)})
		if err != nil {
			t.Fatal(err)
		}
		if string(e.Data) != data {
			t.Errorf("%s\n got %s\nwant %s", kind, e.Data, data)
		}
	}
	if _, err := l.Append(nucleus.Entry{Kind: "log.x", Data: json.RawMessage(`{"a":1,"a":2}`)}); err == nil {
		t.Error("took an object with two members of one name")
	}
	l.Close()
	if r := mustVerify(t, dir, nil); !r.OK() {
		t.Error(r.Problems)
	}
}
