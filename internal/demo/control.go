package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// wall is one wall of the demo and how it is taken away: source lines that are
// replaced when the programs are built anew, for this control alone.
type wall struct {
	name    string
	file    string
	replace [][2]string // old, new; each old stands exactly once
	want    map[string]bool
}

func walls(s *stage) []wall {
	return []wall{
		{
			name: "the trifecta rule and nu, which make a way out an ask",
			file: "policy/decide.go",
			replace: [][2]string{
				{"case takes.Has(nucleus.WayOut) && before.Has(nucleus.Private|nucleus.Untrusted):", "case false:"},
				{"case p.lowers(i, m):", "case false:"},
			},
			want: map[string]bool{"pushed": true, "posted": true},
		},
		{
			name:    "the gateway's default deny",
			file:    "node/gate.go",
			replace: [][2]string{{"\truling := egress.Ruling{Verdict: nucleus.Allow, Literals: p.", "\tif true {\n\t\treturn egress.Ruling{Verdict: nucleus.Allow, Literals: []netip.Prefix{netip.MustParsePrefix(\"127.0.0.0/8\")}}, nil\n\t}\n\truling := egress.Ruling{Verdict: nucleus.Allow, Literals: p."}},
			want:    map[string]bool{"connected": true},
		},
		{
			name:    "the absence of the host's files",
			file:    "image/host.go",
			replace: [][2]string{{`root.Binds = append(root.Binds, Bind{usr, "/usr"})`, fmt.Sprintf(`root.Binds = append(root.Binds, Bind{usr, "/usr"}, Bind{%q, %q})`, s.private, s.private)}},
			want:    map[string]bool{"hostFile": true},
		},
	}
}

// controls runs the attack behind each wall that is gone, and once with all of
// them standing.
func controls(ctx context.Context, bin string) error {
	standing, err := attack(ctx, bin, nil)
	if err != nil {
		return err
	}
	fmt.Printf("all walls stand:\n")
	show("world", standing.String())
	if standing.any() {
		return fmt.Errorf("the attack got through although all walls stand")
	}
	for i := range 3 {
		var name string
		var want map[string]bool
		got, err := attack(ctx, bin, func(s *stage) error {
			w := walls(s)[i]
			name, want = w.name, w.want
			return s.rebuild(ctx, w)
		})
		if err != nil {
			return fmt.Errorf("without %s: %w", name, err)
		}
		fmt.Printf("\nwithout %s:\n", name)
		show("world", got.String())
		for what, happened := range map[string]bool{"pushed": got.pushed, "posted": got.posted, "connected": got.connected, "hostFile": got.hostFile} {
			if happened != want[what] {
				return fmt.Errorf("without %s: %s is %v, want %v: the demo's refusal is not this wall's", name, what, happened, want[what])
			}
		}
	}
	fmt.Println("\neach attack succeeds exactly where its wall is gone")
	return nil
}

func attack(ctx context.Context, bin string, prepare func(*stage) error) (leaks, error) {
	s, err := newStage(ctx, bin)
	if err != nil {
		return leaks{}, err
	}
	defer s.close(false)
	if prepare != nil {
		if err := prepare(s); err != nil {
			return leaks{}, err
		}
	}
	if out, err := s.run(ctx); err != nil {
		return leaks{}, fmt.Errorf("%w: %s", err, out)
	}
	got, err := s.leaks(ctx)
	if err == nil {
		err = s.failure()
	}
	return got, err
}

// rebuild builds the programs without a wall, into the stage's own directory.
func (s *stage) rebuild(ctx context.Context, w wall) error {
	source, err := filepath.Abs(w.file)
	if err != nil {
		return err
	}
	raw, err := os.ReadFile(source)
	if err != nil {
		return err
	}
	text := string(raw)
	for _, r := range w.replace {
		if n := strings.Count(text, r[0]); n != 1 {
			return fmt.Errorf("%s: %q stands %d times, want once", w.file, r[0], n)
		}
		text = strings.Replace(text, r[0], r[1], 1)
	}
	mutant := filepath.Join(s.dir, "mutant.go")
	if err := os.WriteFile(mutant, []byte(text), 0o600); err != nil {
		return err
	}
	overlay, err := json.Marshal(map[string]map[string]string{"Replace": {source: mutant}})
	if err != nil {
		return err
	}
	overlayFile := filepath.Join(s.dir, "overlay.json")
	if err := os.WriteFile(overlayFile, overlay, 0o600); err != nil {
		return err
	}
	without := filepath.Join(s.dir, "bin")
	build := exec.CommandContext(ctx, "go", "build", "-overlay", overlayFile, "-ldflags=-s -w", "-o", without+"/", "./cmd/...")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return fmt.Errorf("building without the wall: %w: %s", err, out)
	}
	if err := os.Chmod(s.dir, 0o755); err != nil { // the machine's user must reach runsc
		return err
	}
	if err := os.Symlink(filepath.Join(s.bin, "runsc"), filepath.Join(without, "runsc")); err != nil {
		return err
	}
	s.bin = without
	return nil
}
