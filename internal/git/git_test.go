package git

import (
	"bufio"
	"io"
	"strings"
	"testing"
)

// Whatever stands at the head of a bundle: what is read from it is one commit for the ref that
// was asked for, and what follows the head is left for the pack.
func FuzzBundleHead(f *testing.F) {
	const ref = "refs/heads/agent/work"
	id := strings.Repeat("1", 40)
	for _, head := range []string{
		"# v2 git bundle\n" + id + " " + ref + "\n\nPACK", "# v2 git bundle\n-" + id + " base\n" + id + " " + ref + "\n\nPACK",
		"# v3 git bundle\n@object-format=sha1\n" + id + " " + ref + "\n\n", "# v2 git bundle\n\n", "# v9 git bundle\n", "PACK", "",
		"# v2 git bundle\n" + id + " refs/heads/main\n\n", "# v2 git bundle\n" + id + " " + ref + "\n" + id + " " + ref + "\n\n", "# v2 git bundle\nHEAD " + ref + "\n\n",
	} {
		f.Add(head)
	}
	f.Fuzz(func(t *testing.T, head string) {
		reader := bufio.NewReader(strings.NewReader(head))
		commit, err := bundleHead(reader, ref)
		if err != nil {
			return
		}
		if len(commit) < 40 || strings.Trim(commit, "0123456789abcdef") != "" {
			t.Fatalf("commit %q", commit)
		}
		rest, err := io.ReadAll(reader)
		if err != nil {
			t.Fatal(err)
		}
		read := head[:len(head)-len(rest)]
		if !strings.HasSuffix(read, "\n\n") || strings.Count(read, " "+ref+"\n") != 1 || !strings.Contains(read, "\n"+commit+" "+ref+"\n") {
			t.Fatalf("%q gave %s", read, commit)
		}
	})
}
