package e2e

import (
	"bytes"
	"encoding/base64"
	"errors"
	"fmt"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"cal/internal/testenv"
)

// canaries are secrets of the host, by where they lie. Each is of the form
// canary-WHERE-RANDOM, so that one pattern finds all and no pattern finds itself.
type canaries struct {
	secret map[string]string
	files  map[string]string // file on the host -> canary in it
	agent  *listener         // at the person's ssh agent
}

// pattern finds canaries and not itself.
const pattern = `canar[y]-[a-z]+-[a-z0-9]+`

func (c *canaries) make(where string) string {
	c.secret[where] = "canary-" + where + "-" + random()
	return c.secret[where]
}

// plantHost puts canaries wherever a person's secrets lie.
func plantHost(t *testing.T, e *testenv.Env, repo *testenv.Repo) *canaries {
	t.Helper()
	c := &canaries{secret: map[string]string{}, files: map[string]string{}}
	put := func(where, path, format string) {
		secret := c.make(where)
		e.Write(path, fmt.Sprintf(format, secret))
		c.files[path] = secret
	}
	for where, name := range map[string]string{
		"ssh": ".ssh/id_ed25519", "aws": ".aws/credentials", "history": ".bash_history", "netrc": ".netrc", "github": ".config/gh/hosts.yml",
		"claude": ".claude/.credentials.json", "codex": ".codex/auth.json", "npm": ".npmrc", "document": "Documents/plan.txt",
	} {
		put(where, filepath.Join(e.Home, name), "//registry.example.org/:_authToken=%s\n")
	}
	put("gitconfig", filepath.Join(e.Home, ".gitconfig"), "[user]\n\tname = Test Person\n\temail = person@example.org\n[github]\n\ttoken = %s\n[init]\n\tdefaultBranch = main\n")
	put("tmp", filepath.Join(e.Dir, "beside-the-repo.txt"), "%s\n")
	put("uncommitted", filepath.Join(repo.Dir, "notes.local"), "%s\n")
	put("githook", filepath.Join(repo.Dir, ".git", "hooks", "canary"), "#!/bin/sh\n# %s\n")
	if isRoot() {
		// Readable for everybody, as most of /etc is: absence is the wall.
		for where, dir := range map[string]string{"etc": "/etc", "vartmp": "/var/tmp", "srv": "/opt"} {
			f, err := os.CreateTemp(dir, "cal-e2e-*.conf")
			if err != nil {
				continue
			}
			f.Close()
			t.Cleanup(func() { os.Remove(f.Name()) })
			put(where, f.Name(), "%s\n")
		}
	}
	repo.Git("remote", "add", "private", "https://person:"+c.make("remote")+"@git.example.org/private.git")
	e.Vars["SOME_TOKEN"] = c.make("environment")
	socket := filepath.Join(e.Dir, c.make("agentpath"), "agent.sock")
	if err := os.MkdirAll(filepath.Dir(socket), 0o755); err != nil {
		t.Fatal(err)
	}
	c.agent = listen(t, "unix", socket)
	e.Vars["SSH_AUTH_SOCK"] = socket
	return c
}

// found lists the canaries of the host that stand in a text, by where they were planted.
func (c *canaries) found(text []byte) []string {
	var where []string
	for _, name := range slices.Sorted(maps.Keys(c.secret)) {
		secret := c.secret[name]
		if bytes.Contains(text, []byte(secret)) || bytes.Contains(text, []byte(base64.StdEncoding.EncodeToString([]byte(secret)))) {
			where = append(where, name)
		}
	}
	return where
}

// search is a script that prints every canary which its user can find in the machine:
// in files, in the environment, arguments and memory maps of every process that it sees,
// and at the paths where the host has them. The programs that every machine shows of
// the host (/usr) are left out, as are files of 8 MB and more.
func (c *canaries) search() string {
	var b strings.Builder
	b.WriteString("exec 2>/dev/null\n")
	fmt.Fprintf(&b, "find / -xdev \\( -path /usr -o -path /proc -o -path /sys -o -path /.nucleus \\) -prune -o -type f -size -8192k -print0 | xargs -0 grep -aEoh '%s'\n", pattern)
	fmt.Fprintf(&b, "find /home /tmp /dev/shm /run /root /var /etc /opt -type f -size -8192k -print0 | xargs -0 grep -aEoh '%s'\n", pattern)
	fmt.Fprintf(&b, "find / -xdev \\( -path /usr -o -path /proc -o -path /sys \\) -prune -o -print | grep -aEo '%s'\n", pattern)
	fmt.Fprintf(&b, "env | grep -aEo '%s'\n", pattern)
	fmt.Fprintf(&b, "for p in /proc/[0-9]*; do cat $p/environ $p/cmdline $p/maps $p/mountinfo $p/mounts | tr '\\000' '\\n' | grep -aEo '%s'; done\n", pattern)
	for _, path := range slices.Sorted(maps.Keys(c.files)) {
		fmt.Fprintf(&b, "grep -aEoh '%s' %s\n", pattern, path)
	}
	b.WriteString("echo search-ended\n")
	return b.String()
}

// memory reads the memory of every machine of e as the host sees it, and returns
// which of the wanted strings stand in it.
func memory(t *testing.T, e *testenv.Env, want map[string]string) (found []string) {
	t.Helper()
	files := 0
	for _, pid := range e.Sandboxes() {
		for _, part := range guestMemory(t, pid) {
			files++
			where, err := scan(part, want)
			if err != nil {
				t.Fatal(err)
			}
			found = append(found, where...)
		}
	}
	if files == 0 {
		t.Fatal("no machine's memory was found")
	}
	slices.Sort(found)
	return slices.Compact(found)
}

// extent is a part of a file, up to its end where size is 0.
type extent struct {
	path        string
	start, size int64
}

// guestMemory finds a machine's memory in its sandbox: gVisor's in a file of memory, that of QEMU's
// guest as the largest part of its own.
func guestMemory(t *testing.T, pid int) []extent {
	t.Helper()
	fds, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
	if err != nil {
		t.Fatal(err)
	}
	var parts []extent
	for _, fd := range fds {
		if target, err := os.Readlink(fd); err == nil && strings.HasPrefix(target, "/memfd:runsc-memory") {
			parts = append(parts, extent{path: fd})
		}
	}
	maps, err := os.ReadFile(fmt.Sprintf("/proc/%d/maps", pid))
	if err != nil || len(parts) > 0 {
		return parts
	}
	largest := extent{path: fmt.Sprintf("/proc/%d/mem", pid)}
	for line := range strings.Lines(string(maps)) {
		var from, to int64
		if n, _ := fmt.Sscanf(line, "%x-%x rw-p 00000000 00:00 0", &from, &to); n == 2 && to-from > largest.size {
			largest.start, largest.size = from, to-from
		}
	}
	return []extent{largest}
}

// scan looks for strings in a part of a file, of a sparse file where it holds data.
func scan(where extent, want map[string]string) (found []string, err error) {
	f, err := os.Open(where.path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	look := func(start, end int64) {
		const piece, overlap = 4 << 20, 512
		buf := make([]byte, piece+overlap)
		for off := start; off < end; off += piece {
			n, err := f.ReadAt(buf[:min(int64(len(buf)), end-off)], off)
			if n == 0 && err != nil {
				break // the guest gave it back meanwhile
			}
			for name, secret := range want {
				if bytes.Contains(buf[:n], []byte(secret)) && !slices.Contains(found, name) {
					found = append(found, name)
				}
			}
		}
	}
	if where.size > 0 {
		look(where.start, where.start+where.size)
		return found, nil
	}
	for at := int64(0); ; {
		start, err := unix.Seek(int(f.Fd()), at, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			return found, nil
		}
		if err != nil {
			return nil, err
		}
		end, err := unix.Seek(int(f.Fd()), start, unix.SEEK_HOLE)
		if err != nil {
			return nil, err
		}
		look(start, end)
		at = end
	}
}

// keys are the secrets that CAL itself keeps on the host.
func keys(t *testing.T, e *testenv.Env) map[string]string {
	t.Helper()
	names, err := filepath.Glob(filepath.Join(e.CAL, "keys", "*.key"))
	if err != nil || len(names) == 0 {
		t.Fatalf("%d keys: %v", len(names), err)
	}
	found := map[string]string{}
	for _, name := range names {
		raw, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		found[filepath.Base(name)] = strings.TrimSpace(string(raw))
	}
	return found
}

// attempts is a script that tries to reach the canary listeners by every way that a
// program in the machine has: directly, by the HTTP proxy, by SOCKS, and at the
// sockets of the host.
func attempts(addr, abstract string) string {
	host, port, _ := net.SplitHostPort(addr)
	return fmt.Sprintf(`exec 2>&1
try() { name=$1; shift; if timeout 5 bash -c "$*"; then echo "$name: exit 0"; else echo "$name: refused"; fi; }
try direct 'exec 3<>/dev/tcp/%[1]s/%[2]s && echo hello >&3'
try proxy-connect 'exec 3<>/dev/tcp/127.0.0.1/8080; printf "CONNECT %[1]s:%[2]s HTTP/1.1\r\nHost: %[1]s:%[2]s\r\n\r\n" >&3; head -1 <&3 | grep " 200"'
try proxy-get 'exec 3<>/dev/tcp/127.0.0.1/8080; printf "GET http://%[1]s:%[2]s/ HTTP/1.1\r\nHost: %[1]s:%[2]s\r\nConnection: close\r\n\r\n" >&3; head -1 <&3 | grep " 200"'
try proxy-name 'exec 3<>/dev/tcp/127.0.0.1/8080; printf "CONNECT localhost:%[2]s HTTP/1.1\r\nHost: localhost:%[2]s\r\n\r\n" >&3; head -1 <&3 | grep " 200"'
try socks 'exec 3<>/dev/tcp/127.0.0.1/1080; printf "\x05\x01\x00" >&3; head -c2 <&3 >/dev/null; printf "\x05\x01\x00\x01\x7f\x00\x00\x01\x%02[4]x\x%02[5]x" >&3; head -c2 <&3 | od -An -tx1 | grep "05 00"'
try unix 'ls /tmp/cal-e2e-*/*/agent.sock /run/user/*/* /tmp/ssh-*'
try abstract 'grep -q %[3]s /proc/net/unix'
echo attempts-ended
`, host, port, abstract, portByte(port, 8), portByte(port, 0))
}

func portByte(port string, shift uint) int {
	var n int
	fmt.Sscan(port, &n)
	return n >> shift & 0xff
}

// scanTree looks for the host's canaries in every file of a tree.
func scanTree(root string, c *canaries) (found []string, err error) {
	err = filepath.WalkDir(root, func(path string, d os.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		raw, err := os.ReadFile(path)
		for _, where := range c.found(raw) {
			found = append(found, where+" in "+path)
		}
		return err
	})
	return found, err
}
