package tools

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"cal/nucleus"
	"cal/wire"
)

func TestRunArgv(t *testing.T) {
	t.Setenv("CANARY_OF_THE_WORKER", "secret")
	b := newBench(t, func(c *Config) { c.Env["GIVEN"] = "yes" })
	check(t, os.Mkdir(b.path("sub"), 0o755))
	run := func(args RunArgs) RunResult {
		t.Helper()
		var r RunResult
		b.must(nucleus.RunBash, args, &r)
		return r
	}
	if r := run(RunArgs{Argv: []string{"printf", "%s|", "a b", "$HOME", "*", ""}}); r.Stdout != "a b|$HOME|*||" || r.ExitCode != 0 {
		t.Errorf("argv was not executed as given: %+v", r)
	}
	if r := run(RunArgs{Script: "echo $((1+1)); echo err >&2; exit 7"}); r.Stdout != "2\n" || r.Stderr != "err\n" || r.ExitCode != 7 {
		t.Errorf("%+v", r)
	}
	if r := run(RunArgs{Argv: []string{"pwd"}, Dir: "sub"}); r.Stdout != b.path("sub")+"\n" {
		t.Errorf("%+v", r)
	}
	if r := run(RunArgs{Argv: []string{"cat"}, Stdin: "from stdin"}); r.Stdout != "from stdin" {
		t.Errorf("%+v", r)
	}
	if r := run(RunArgs{Argv: []string{"cat"}}); r.Stdout != "" {
		t.Errorf("%+v", r)
	}
	if r := run(RunArgs{Argv: []string{"true"}, Stdin: strings.Repeat("not read", 1<<17)}); r.ExitCode != 0 {
		t.Errorf("%+v", r)
	}
	if r := run(RunArgs{Script: "kill -SEGV $$"}); r.ExitCode != 128+11 {
		t.Errorf("%+v", r)
	}
	binary := "\xff\x00\xfe"
	if r := run(RunArgs{Script: `printf '\377\000\376'`}); r.StdoutB64 != base64.StdEncoding.EncodeToString([]byte(binary)) || r.Stdout != "" {
		t.Errorf("%+v", r)
	}
	env := run(RunArgs{Argv: []string{"env"}}).Stdout
	if !strings.Contains(env, "GIVEN=yes\n") || !strings.Contains(env, "HOME="+filepath.Dir(b.workspace)+"\n") || strings.Contains(env, "CANARY") {
		t.Errorf("environment:\n%s", env)
	}
}

func TestRunRefuses(t *testing.T) {
	b := newBench(t, nil)
	b.write("plain", "text")
	b.write("noshebang", "\x01\x02")
	check(t, os.Chmod(b.path("noshebang"), 0o755))
	check(t, os.Symlink("/etc", b.path("etc")))
	big := strings.Repeat("x", 200<<10)
	for _, c := range []struct {
		args RunArgs
		kind nucleus.Kind
		part string
	}{
		{RunArgs{Argv: []string{"no-such-program"}}, nucleus.KindNotFound, "not found in PATH"},
		{RunArgs{Argv: []string{"./none"}}, nucleus.KindNotFound, "does not exist"},
		{RunArgs{Argv: []string{"plain"}}, nucleus.KindNotFound, "not found in PATH"}, // never from the current directory
		{RunArgs{Argv: []string{"./plain"}}, nucleus.KindFailed, "not executable"},
		{RunArgs{Argv: []string{"./noshebang"}}, nucleus.KindFailed, "neither a program"},
		{RunArgs{Argv: []string{"/"}}, nucleus.KindInvalid, "is a directory"},
		{RunArgs{Argv: []string{"true"}, Dir: "etc"}, nucleus.KindDenied, "out of the workspace"},
		{RunArgs{Argv: []string{"true"}, Dir: "/etc"}, nucleus.KindDenied, "outside"},
		{RunArgs{Argv: []string{"true"}, Dir: "plain"}, nucleus.KindInvalid, "not a directory"},
		{RunArgs{Argv: []string{"true"}, Dir: "none"}, nucleus.KindNotFound, "does not exist"},
		{RunArgs{Argv: []string{"echo", big}}, nucleus.KindTooLarge, "more than the kernel takes"},
		{RunArgs{Output: "bash-none"}, nucleus.KindNotFound, "no background command"},
	} {
		if err := b.do(nucleus.RunBash, c.args, nil); err == nil {
			t.Errorf("%.60v succeeded", c.args)
		} else {
			wantKind(t, err, c.kind, c.part)
		}
	}
	if r := b.sh("echo serves on"); r.Stdout != "serves on\n" {
		t.Errorf("%+v", r)
	}
}

func TestActionOfCommand(t *testing.T) {
	b := newBench(t, func(c *Config) { c.Blocked = func(p string) bool { return p == "sub/secret" } })
	b.write("sub/tool.sh", "#!/bin/sh\n")
	b.write("sub/data", "data")
	b.write("sub/secret", "x")
	check(t, os.Chmod(b.path("sub/tool.sh"), 0o755))
	check(t, os.Symlink("data", b.path("sub/alias")))
	action, err := b.resolve(Call{Op: nucleus.RunBash, Terminal: true}, RunArgs{
		Argv: []string{"./tool.sh", "alias", "--in=data", "secret", "../sub/data", "/etc/passwd", "-x", "none", "."}, Dir: "sub"})
	check(t, err)
	c := action.Command
	want := []nucleus.File{{Path: "sub/tool.sh", Before: nucleus.SHA256([]byte("#!/bin/sh\n"))}, {Path: "sub/data", Before: nucleus.SHA256([]byte("data"))}}
	if fmt.Sprint(c.Files) != fmt.Sprint(want) || c.Binary != b.path("sub/tool.sh") || c.Dir != "sub" || !c.TTY || c.Script {
		t.Errorf("%+v", c)
	}
	action, err = b.resolve(Call{Op: nucleus.RunBash}, RunArgs{Script: "echo x", Stdin: "in"})
	check(t, err)
	if c := action.Command; !c.Script || len(c.Argv) != 3 || c.Argv[2] != "echo x" || c.Stdin != nucleus.SHA256([]byte("in")) || c.Dir != "." {
		t.Errorf("%+v", c)
	}
	many := []string{"cat"}
	for i := range 100 {
		b.write(fmt.Sprintf("f%d", i), "x")
		many = append(many, fmt.Sprintf("f%d", i))
	}
	action, err = b.resolve(Call{Op: nucleus.RunBash}, RunArgs{Argv: many})
	check(t, err)
	if n := len(action.Command.Files); n != maxNamedFiles {
		t.Errorf("%d files, want %d", n, maxNamedFiles)
	}
}

// pidsIn reads the pids that a command wrote into a file.
func pidsIn(t *testing.T, b *bench, name string, count int) []int {
	t.Helper()
	var pids []int
	eventually(t, "pids in "+name, func() bool {
		data, _ := os.ReadFile(b.path(name))
		pids = nil
		for _, f := range strings.Fields(string(data)) {
			pid, _ := strconv.Atoi(f)
			pids = append(pids, pid)
		}
		return len(pids) >= count
	})
	return pids
}

// A command's descendants end with it: children, children of another session,
// children that shed their parent, and those that ignore SIGTERM.
const spawnAll = `
sleep 300 & echo $! >> pids
setsid sleep 300 & echo $! >> pids
(setsid sh -c 'echo $$ >> pids; exec sleep 300' &) 
sh -c 'trap "" TERM HUP; echo $$ >> pids; while :; do sleep 1; done' &
while [ $(wc -l < pids) -lt 4 ]; do sleep 0.01; done
`

func TestDescendantsEnd(t *testing.T) {
	cases := map[string]func(b *bench){
		"end of the command": func(b *bench) { b.sh(spawnAll) },
		"timeout": func(b *bench) {
			var r RunResult
			b.must(nucleus.RunBash, RunArgs{Script: spawnAll + "sleep 300", TimeoutS: 1}, &r)
			if !r.TimedOut || r.ExitCode < 128 || !strings.Contains(r.Notice, "ended after 1s") {
				t.Errorf("%+v", r)
			}
		},
		"the caller goes away": func(b *bench) {
			stream, err := b.begin(Call{Op: nucleus.RunBash}, RunArgs{Script: spawnAll + "sleep 300"})
			check(t, err)
			pidsIn(t, b, "pids", 4)
			stream.Close()
		},
		"stop": func(b *bench) {
			var r RunResult
			b.must(nucleus.RunBash, RunArgs{Script: spawnAll + "sleep 300", Background: true}, &r)
			pidsIn(t, b, "pids", 4)
			b.must(nucleus.RunBash, RunArgs{Stop: r.ID}, &r)
		},
		"end of the session": func(b *bench) {
			b.must(nucleus.RunBash, RunArgs{Script: spawnAll + "sleep 300", Background: true}, nil)
			pidsIn(t, b, "pids", 4)
			b.end()
			for _, pid := range pidsIn(t, b, "pids", 4) {
				if !gone(pid) {
					p, _ := readProcess(pid)
					name, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
					t.Errorf("process %+v lives after Serve has returned: %q", p, name)
				}
			}
		},
	}
	for name, end := range cases {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := newBench(t, nil)
			end(b)
			for _, pid := range pidsIn(t, b, "pids", 4) {
				eventually(t, fmt.Sprintf("end of process %d", pid), func() bool { return gone(pid) })
			}
		})
	}
}

// One command's end leaves the others alone.
func TestEndSparesOthers(t *testing.T) {
	b := newBench(t, nil)
	var job RunResult
	b.must(nucleus.RunBash, RunArgs{Script: "setsid sh -c 'echo $$ > pid; exec sleep 300' & sleep 300", Background: true}, &job)
	pid := pidsIn(t, b, "pid", 1)[0]
	for range 5 {
		b.sh("setsid sleep 300 >/dev/null 2>&1 &")
	}
	if gone(pid) {
		t.Error("the end of another command killed a background command's process")
	}
	b.must(nucleus.RunBash, RunArgs{Output: job.ID}, &job)
	if !job.Running {
		t.Errorf("%+v", job)
	}
}

func TestOutputIsCapped(t *testing.T) {
	b := newBench(t, func(c *Config) { c.OutputCap = 1000 })
	r := b.sh("head -c 300000000 /dev/zero | tr '\\0' 'a'; echo END")
	if !strings.HasPrefix(r.Stdout, strings.Repeat("a", 500)+"\n[... 299999004 bytes cut ...]\n") || !strings.HasSuffix(r.Stdout, "aEND\n") || r.StdoutCut != 299999004 {
		t.Errorf("%d bytes, cut %d: %.40q ... %q", len(r.Stdout), r.StdoutCut, r.Stdout, r.Stdout[len(r.Stdout)-60:])
	}
	r = b.sh("for i in $(seq 1000); do printf 'é'; done")
	if !strings.Contains(r.Stdout, "bytes cut") || strings.Contains(r.Stdout, "\ufffd") || r.StdoutB64 != "" {
		t.Errorf("%+v", r)
	}
	r = b.sh("head -c 5000 /dev/zero | tr '\\0' '\\377'")
	if r.StdoutCut != 4500 || r.Stdout != "" || r.StdoutB64 == "" {
		t.Errorf("%+v", r)
	}
	var m runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&m)
	if m.HeapAlloc > 100<<20 {
		t.Errorf("heap holds %d bytes after 300 MB of output", m.HeapAlloc)
	}
}

func TestKeeper(t *testing.T) {
	for _, cap := range []int{1, 2, 3, 10, 64} {
		for _, chunk := range []int{1, 3, 7, 200} {
			k := newKeeper(cap)
			var all strings.Builder
			for n := 0; n < 150; n += chunk {
				piece := strings.Repeat("ab", 100)[:chunk]
				all.WriteString(piece)
				k.Write([]byte(piece))
			}
			whole := all.String()
			want := fmt.Sprintf("%s\n[... %d bytes cut ...]\n%s", whole[:cap-cap/2], len(whole)-cap, whole[len(whole)-cap/2:])
			if got := k.take(); got.text != want || got.cut != int64(len(whole)-cap) {
				t.Errorf("cap %d chunk %d: %q, want %q", cap, chunk, got.text, want)
			}
			if got := k.take(); got != (kept{}) {
				t.Errorf("second take: %+v", got)
			}
		}
	}
}

// An endless command whose reader does not read is held back, and delays
// nobody; when the reader goes away it ends.
func TestStalledReader(t *testing.T) {
	b := newBench(t, nil)
	stream, err := b.begin(Call{Op: nucleus.RunBash, Stream: true}, RunArgs{Script: "echo $$ > pid; exec cat /dev/zero"})
	check(t, err)
	pid := pidsIn(t, b, "pid", 1)[0]
	var group sync.WaitGroup
	for i := range 8 {
		group.Go(func() {
			name := fmt.Sprintf("f%d", i)
			b.must(nucleus.WriteFiles, WriteArgs{Path: name, Content: name}, nil)
			var r ReadResult
			b.must(nucleus.ReadFiles, ReadArgs{Path: name}, &r)
			if r.Content != name {
				t.Errorf("%+v", r)
			}
			if r := b.sh("echo " + name); r.Stdout != name+"\n" {
				t.Errorf("%+v", r)
			}
		})
	}
	group.Wait()
	// Held back: it cannot be further than the window, the pipe and what is under way.
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/io", pid))
	check(t, err)
	written := 0
	for line := range strings.Lines(string(data)) {
		fmt.Sscanf(line, "wchar: %d", &written)
	}
	if written == 0 || written > 8<<20 {
		t.Errorf("the command wrote %d bytes into a stalled stream", written)
	}
	stream.Close()
	eventually(t, "end of the endless command", func() bool { return gone(pid) })
}

func TestStreamedOutputAndInput(t *testing.T) {
	b := newBench(t, nil)
	stream, err := b.begin(Call{Op: nucleus.RunBash, Stream: true, Stdin: true}, RunArgs{Script: "while read line; do echo got $line; done; echo bye >&2; exit 3"})
	check(t, err)
	check(t, stream.Send(wire.FrameStdin, []byte("one\n")))
	kind, payload, err := stream.Recv(1 << 20) // at once, not at the end
	if err != nil || kind != wire.FrameStdout || string(payload) != "got one\n" {
		t.Fatalf("%q %q %v", kind, payload, err)
	}
	check(t, stream.Send(wire.FrameStdin, []byte("two\n")))
	check(t, stream.Send(wire.FrameStdin, nil))
	out := b.finish(stream)
	if out.stdout != "got two\n" || out.stderr != "bye\n" || out.result.ExitCode != 3 {
		t.Errorf("%+v", out)
	}
	// More input than any buffer holds, echoed.
	stream, err = b.begin(Call{Op: nucleus.RunBash, Stream: true, Stdin: true}, RunArgs{Argv: []string{"wc", "-c"}})
	check(t, err)
	block := make([]byte, 1<<20)
	for range 20 {
		check(t, stream.Send(wire.FrameStdin, block))
	}
	check(t, stream.Send(wire.FrameStdin, nil))
	if out := b.finish(stream); strings.TrimSpace(out.stdout) != strconv.Itoa(20<<20) {
		t.Errorf("%+v", out)
	}
	// Signals reach it; a last word is heard.
	stream, err = b.begin(Call{Op: nucleus.RunBash, Stream: true}, RunArgs{Script: "trap 'echo caught; exit 9' INT; echo ready; while :; do sleep 0.01; done"})
	check(t, err)
	if _, payload, err := stream.Recv(1 << 20); err != nil || string(payload) != "ready\n" {
		t.Fatalf("%q %v", payload, err)
	}
	check(t, stream.Send(wire.FrameSignal, []byte("INT")))
	if out := b.finish(stream); out.stdout != "caught\n" || out.result.ExitCode != 9 {
		t.Errorf("%+v", out)
	}
	// Input for a command that takes none ends the call.
	stream, err = b.begin(Call{Op: nucleus.RunBash}, RunArgs{Argv: []string{"sleep", "300"}})
	check(t, err)
	check(t, stream.Send(wire.FrameStdin, []byte("x")))
	if out := b.finish(stream); out.result.ExitCode != 137 {
		t.Errorf("%+v", out)
	}
}

// What a process that the shell does not wait for still flushes is not lost.
func TestLateOutputIsKept(t *testing.T) {
	b := newBench(t, nil)
	for range 5 {
		if r := b.sh("echo x > >(sleep 0.05; cat; echo tail)"); r.Stdout != "x\ntail\n" {
			t.Fatalf("%+v", r)
		}
	}
}

func TestTerminal(t *testing.T) {
	b := newBench(t, nil)
	call := Call{Op: nucleus.RunBash, Terminal: true, Rows: 24, Cols: 80}
	script := `trap 'stty size' WINCH; test -t 0 && test -t 1 && test -t 2 && echo tty $TERM; stty size; echo ready
while read -r line; do case $line in quit) exit 5;; *) echo "got $line";; esac; done; echo eof`
	stream, err := b.begin(call, RunArgs{Script: script})
	check(t, err)
	var seen string
	until := func(want string) {
		t.Helper()
		for !strings.Contains(seen, want) {
			kind, payload, err := stream.Recv(1 << 20)
			if err != nil || kind != wire.FrameStdout {
				t.Fatalf("waiting for %q: %q %q %v; seen %q", want, kind, payload, err, seen)
			}
			seen += string(payload)
		}
	}
	until("ready\r\n")
	if !strings.Contains(seen, "tty xterm-256color\r\n24 80\r\n") {
		t.Errorf("seen %q", seen)
	}
	check(t, stream.Send(wire.FrameSize, []byte(`{"rows":50,"cols":132}`)))
	check(t, stream.Send(wire.FrameStdin, []byte("hello\n")))
	until("got hello")
	check(t, stream.Send(wire.FrameStdin, []byte("again\n")))
	until("50 132")
	check(t, stream.Send(wire.FrameStdin, []byte("quit\n")))
	if out := b.finish(stream); out.result.ExitCode != 5 {
		t.Errorf("%+v", out.result)
	}

	// Ctrl-C as a key reaches the group in the foreground, and so does the signal.
	for _, press := range []func(*wire.Stream) error{
		func(s *wire.Stream) error { return s.Send(wire.FrameStdin, []byte{3}) },
		func(s *wire.Stream) error { return s.Send(wire.FrameSignal, []byte("INT")) },
	} {
		stream, err = b.begin(call, RunArgs{Argv: []string{"bash", "--norc", "-ic", "sleep 300; echo after $?"}})
		check(t, err)
		eventually(t, "sleep in the foreground", func() bool {
			table, _ := processes(time.Now().Add(patience))
			for _, p := range table {
				if name, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", p.pid)); string(name) == "sleep\x00300\x00" {
					if cwd, _ := os.Readlink(fmt.Sprintf("/proc/%d/cwd", p.pid)); cwd == b.workspace {
						return true
					}
				}
			}
			return false
		})
		check(t, press(stream))
		if out := b.finish(stream); out.result.ExitCode == 0 || strings.Contains(out.stdout, "after") {
			t.Errorf("%q %+v", out.stdout, out.result)
		}
	}

	// The end of input is one on a terminal too.
	stream, err = b.begin(call, RunArgs{Script: script})
	check(t, err)
	seen = ""
	until("ready")
	check(t, stream.Send(wire.FrameStdin, nil))
	if out := b.finish(stream); !strings.Contains(out.stdout, "eof") || out.result.ExitCode != 0 {
		t.Errorf("%+v", out)
	}
}

func TestBackground(t *testing.T) {
	b := newBench(t, func(c *Config) { c.OutputCap = 1000 })
	var job RunResult
	b.must(nucleus.RunBash, RunArgs{Script: "echo first; while [ ! -e go ]; do sleep 0.01; done; echo second; exit 4", Background: true}, &job)
	if job.ID == "" || !job.Running {
		t.Fatalf("%+v", job)
	}
	collect := func(want string) RunResult {
		t.Helper()
		var all string
		var r RunResult
		eventually(t, want, func() bool {
			b.must(nucleus.RunBash, RunArgs{Output: job.ID}, &r)
			all += r.Stdout
			return all == want
		})
		return r
	}
	collect("first\n")
	b.write("go", "")
	collect("second\n")
	var r RunResult
	eventually(t, "the end", func() bool {
		b.must(nucleus.RunBash, RunArgs{Output: job.ID}, &r)
		return !r.Running
	})
	if r.ExitCode != 4 {
		t.Errorf("%+v", r)
	}
	// It may be stopped after its end, and an endless one stays bounded.
	b.must(nucleus.RunBash, RunArgs{Stop: job.ID}, &r)
	b.must(nucleus.RunBash, RunArgs{Argv: []string{"yes"}, Background: true}, &job)
	eventually(t, "much output", func() bool {
		b.must(nucleus.RunBash, RunArgs{Output: job.ID}, &r)
		return r.StdoutCut > 1<<20
	})
	if len(r.Stdout) > 1100 {
		t.Errorf("%d bytes", len(r.Stdout))
	}
	b.must(nucleus.RunBash, RunArgs{Stop: job.ID}, &r)
	if r.Running || r.ExitCode != 143 {
		t.Errorf("%+v", r)
	}
	// More than the limit at once are refused.
	for i := 0; ; i++ {
		err := b.do(nucleus.RunBash, RunArgs{Argv: []string{"sleep", "300"}, Background: true}, nil)
		if err == nil && i < maxJobs {
			continue
		}
		wantKind(t, err, nucleus.KindConflict, "32 background commands are running")
		if i != maxJobs {
			t.Errorf("refused after %d", i)
		}
		break
	}
}

func TestTimeouts(t *testing.T) {
	w := &worker{config: Config{DefaultTimeout: time.Minute, MaxTimeout: time.Hour}.withDefaults()}
	for _, c := range []struct {
		call Call
		args RunArgs
		want time.Duration
	}{
		{Call{}, RunArgs{}, time.Minute},
		{Call{}, RunArgs{TimeoutS: 5}, 5 * time.Second},
		{Call{}, RunArgs{TimeoutS: 7200}, time.Hour},
		{Call{Stream: true}, RunArgs{}, time.Hour},
		{Call{Terminal: true}, RunArgs{}, time.Hour},
		{Call{}, RunArgs{Background: true}, time.Hour},
	} {
		if got := w.timeout(&caller{call: c.call}, c.args); got != c.want {
			t.Errorf("%+v %+v: %v, want %v", c.call, c.args, got, c.want)
		}
	}
}

// As process 1 of a machine the worker reaps every orphan, steals no exit
// status, outlives a fork bomb, and leaves nothing.
func TestProcessOne(t *testing.T) {
	b, cmd := newWorkerProcess(t)
	if r := b.sh("readlink /proc/self > self; echo $$"); strings.TrimSpace(r.Stdout) == "" || b.read("self") == "" {
		t.Skip("no /proc for the namespace here")
	}
	// Nothing of the worker's descriptors is inherited: 0, 1, 2 and the one of ls.
	if fds := strings.Fields(b.sh("exec ls /proc/self/fd").Stdout); len(fds) != 4 {
		t.Errorf("descriptors of a command: %v", fds)
	}
	zombies := func() (n int) {
		dir, err := filepath.Glob("/proc/[0-9]*/stat")
		check(t, err)
		for _, name := range dir {
			pid, _ := strconv.Atoi(strings.Split(name, "/")[2])
			if p, err := readProcess(pid); err == nil && p.state == 'Z' && p.parent == cmd.Process.Pid {
				n++
			}
		}
		return n
	}
	var group sync.WaitGroup
	for i := range 8 {
		group.Go(func() {
			for j := range 10 {
				code := (i*10 + j) % 120
				var r RunResult
				// Orphans that end at once, orphans that stay, and an exit code of its own.
				b.must(nucleus.RunBash, RunArgs{Script: fmt.Sprintf("(true &) ; (setsid env -i sleep 300 >/dev/null 2>&1 &) ; exit %d", code)}, &r)
				if r.ExitCode != code {
					t.Errorf("exit code %d, want %d", r.ExitCode, code)
				}
			}
		})
	}
	group.Wait()
	eventually(t, "no zombies", func() bool { return zombies() == 0 })
	eventually(t, "no orphan left", func() bool {
		return !strings.Contains(b.sh("cat /proc/[0-9]*/cmdline | tr '\\0' ' '").Stdout, "sleep 300")
	})

	var r RunResult
	b.must(nucleus.RunBash, RunArgs{Script: "bomb() { [ $1 = 0 ] || { bomb $(($1-1)) & bomb $(($1-1)) & }; sleep 300; }; bomb 10", TimeoutS: 60}, &r)
	if !strings.Contains(r.Notice, "processes, at most 300") || r.TimedOut {
		t.Errorf("fork bomb: %+v", r)
	}
	if r := b.sh("echo serves on"); r.Stdout != "serves on\n" {
		t.Errorf("%+v", r)
	}
	b.must(nucleus.RunBash, RunArgs{Script: "setsid sleep 300 & sleep 300", Background: true}, nil)
	b.end() // fails if the worker finds a process that it has not reaped
}

// The worker's memory is closed to the commands of its own user.
func TestNotDumpable(t *testing.T) {
	if os.Getuid() == 0 {
		t.Skip("root may read any process; run as an ordinary user")
	}
	b, _ := newWorkerProcess(t)
	for _, name := range []string{"environ", "mem", "maps", "fd/0", "cwd"} {
		if r := b.sh("cat /proc/1/" + name + " >/dev/null && echo read"); r.Stdout != "" {
			t.Errorf("/proc/1/%s of the worker was read", name)
		}
	}
	if r := b.sh("cat /proc/$$/environ >/dev/null && echo read"); r.Stdout != "read\n" {
		t.Errorf("its own environment: %+v", r)
	}
}

func TestProtocolRefuses(t *testing.T) {
	b := newBench(t, nil)
	for _, c := range []struct {
		kind   string
		header any
		first  string
		part   string
	}{
		{"what", nil, "", "unknown kind of stream"},
		{StreamDo, json.RawMessage(`{"op":"run_bash","extra":1}`), "", "unknown field"},
		{StreamDo, json.RawMessage(`{"op":"execute"}`), "", "unknown operation"},
		{StreamDo, Call{Op: nucleus.WebFetch}, `{"args":{"url":"x"},"action":{"op":"web_fetch","args_sha256":""}}`, "on the host"},
		{StreamDo, Call{Op: nucleus.RunBash}, `{"args":[1]}`, "no action"},
		{StreamDo, Call{Op: nucleus.RunBash}, `nonsense`, "arguments"},
		{StreamUnbundle, Unbundle{Repo: "x", Branch: "--x", Commit: "0"}, "", "not the name of a branch"},
		{StreamBundle, Bundle{Repo: "x", Ref: "a..b"}, "", "not the name of a branch"},
	} {
		stream := b.open(c.kind, c.header)
		if c.first != "" {
			check(t, stream.Send(wire.FrameJSON, []byte(c.first)))
		}
		out := b.finish(stream)
		if out.result.Error == nil || !strings.Contains(out.result.Error.Message, c.part) {
			t.Errorf("%s %s: %+v, want %q", c.kind, marshal(t, c.header), out.result, c.part)
		}
	}
}

func BenchmarkReadFiles1KiB(b *testing.B) {
	w := newBench(b, nil)
	w.write("f", strings.Repeat("x", 1023)+"\n")
	args := ReadArgs{Path: "f"}
	action, _, err := ResolveStatic(nucleus.ReadFiles, marshal(b, args))
	if err != nil {
		b.Fatal(err)
	}
	var took []time.Duration
	for b.Loop() {
		started := time.Now()
		if out := w.finish(w.beginAs(Call{Op: nucleus.ReadFiles}, args, action)); out.result.Error != nil {
			b.Fatal(out.result.Error)
		}
		took = append(took, time.Since(started))
	}
	slices.Sort(took)
	b.ReportMetric(float64(took[len(took)/2].Microseconds()), "p50-µs")
}
