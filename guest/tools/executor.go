package tools

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"sort"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/creack/pty"
	"golang.org/x/sys/unix"

	"cal/nucleus"
)

// Executor runs commands in the workspace. A command is the leader of a session
// of its own; when it ends, by itself or not, everything that it started ends with
// it. It sees no environment but the one that is handed in.
type Executor struct {
	box      *Sandbox
	config   Config
	children *children
	jobs     jobs
	stop     func() // of what starts commands
}

const defaultPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

func newExecutor(box *Sandbox, c Config) (*Executor, error) {
	start, stop, err := confined(c.Confine)
	if err != nil {
		return nil, fmt.Errorf("confining commands: %w", err)
	}
	return &Executor{box: box, config: c, children: newChildren(c.MaxTasks, start), jobs: jobs{all: map[string]*job{}}, stop: stop}, nil
}

// close ends every command and returns when none is left.
func (x *Executor) close() {
	x.children.close()
	x.jobs.wait()
	x.stop()
}

// command is one program to run.
type command struct {
	binary string
	argv   []string
	dir    string            // relative to the workspace
	env    map[string]string // beyond the machine's own
	stdin  io.Reader         // nil: empty
	stdout io.Writer
	stderr io.Writer // unused on a terminal
	tty    bool
	size   pty.Winsize
}

// running is a command that has been started.
type running struct {
	x        *Executor
	child    *child
	terminal *os.File // the master's side, on a terminal
	inputs   []io.Closer
	outputs  []*pump
	feeding  sync.WaitGroup
	failed   chan struct{} // closed when output can be delivered no more
	failOnce sync.Once
}

// environment is the machine's own, then what the call adds.
func (x *Executor) environment(c command, mark string) []string {
	env := map[string]string{"PATH": defaultPath, "LANG": "C.UTF-8"}
	if c.tty {
		env["TERM"] = "xterm-256color"
	}
	if x.config.Home != "" {
		env["HOME"] = x.config.Home
	}
	for _, more := range []map[string]string{x.config.Env, c.env} {
		for name, value := range more {
			env[name] = value
		}
	}
	env["PWD"] = path.Join(x.box.path, c.dir)
	env[callMark] = mark
	list := make([]string, 0, len(env))
	for name, value := range env {
		list = append(list, name+"="+value)
	}
	sort.Strings(list)
	return list
}

// lookup returns the program that argv0 names, as execvp would find it with the
// command's own PATH and directory, and never in the current directory by accident.
func (x *Executor) lookup(argv0, dir string) (string, error) {
	if strings.Contains(argv0, "/") {
		binary := path.Clean(argv0)
		if !path.IsAbs(argv0) {
			binary = path.Join(x.box.path, dir, argv0)
		}
		return binary, executable(argv0, binary)
	}
	search := x.config.Env["PATH"]
	if search == "" {
		search = defaultPath
	}
	for _, place := range strings.Split(search, ":") {
		if binary := path.Join(place, argv0); path.IsAbs(place) && executable(argv0, binary) == nil {
			return binary, nil
		}
	}
	return "", nucleus.Errorf(nucleus.KindNotFound, "command %q not found in PATH %s", argv0, search)
}

func executable(name, binary string) error {
	info, err := os.Stat(binary)
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.ENOTDIR):
		return nucleus.Errorf(nucleus.KindNotFound, "command %q does not exist (%s)", name, binary)
	case err != nil:
		return nucleus.Errorf(nucleus.KindFailed, "command %q: %v", name, err)
	case info.IsDir():
		return nucleus.Errorf(nucleus.KindInvalid, "command %q is a directory", name)
	case unix.Faccessat(unix.AT_FDCWD, binary, unix.X_OK, unix.AT_EACCESS) != nil:
		return nucleus.Errorf(nucleus.KindFailed, "command %q is not executable (mode %04o)", name, info.Mode().Perm())
	}
	return nil
}

// start starts a command. The caller must wait for what it returns.
func (x *Executor) start(c command) (*running, error) {
	mark := rand.Text()
	dir, err := x.box.OpenDir(c.dir)
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	r := &running{x: x, failed: make(chan struct{})}
	var theirs []*os.File
	if c.tty {
		theirs, err = r.openTerminal(c)
	} else {
		theirs, err = r.openPipes(c)
	}
	defer closeAll(theirs)
	if err != nil {
		r.closeOurs()
		return nil, nucleus.Errorf(nucleus.KindFailed, "%s: %v", c.argv[0], err)
	}
	attr := &os.ProcAttr{
		// By descriptor: the directory that was looked at, whatever its name says now.
		Dir:   fmt.Sprintf("/proc/self/fd/%d", dir.Fd()),
		Env:   x.environment(c, mark),
		Files: theirs,
		Sys:   &syscall.SysProcAttr{Setsid: true, Setctty: c.tty},
	}
	if r.child, err = x.children.begin(c.binary, c.argv, attr, mark); err != nil {
		r.closeOurs()
		return nil, startError(c, err)
	}
	r.pump(c)
	return r, nil
}

func startError(c command, err error) error {
	size := 0
	for _, arg := range c.argv {
		size += len(arg) + 1
	}
	switch {
	case errors.Is(err, unix.E2BIG), errors.Is(err, unix.ENAMETOOLONG): // gVisor says the latter
		return nucleus.Errorf(nucleus.KindTooLarge, "%s: the command's %d bytes are more than the kernel takes: put the data into a file or stdin", c.argv[0], size)
	case errors.Is(err, unix.ENOEXEC):
		return nucleus.Errorf(nucleus.KindFailed, "%s is neither a program nor a script with a #! line", c.binary)
	case errors.Is(err, unix.EAGAIN):
		return nucleus.Errorf(nucleus.KindUnavailable, "%s: the machine has no process left", c.argv[0])
	case errors.Is(err, errClosed):
		return nucleus.Errorf(nucleus.KindUnavailable, "%v", err)
	}
	return nucleus.Errorf(nucleus.KindFailed, "%s: %v", c.argv[0], err)
}

func closeAll(files []*os.File) {
	for i, f := range files {
		if i == 0 || f != files[i-1] {
			f.Close()
		}
	}
}

func (r *running) closeOurs() {
	for _, in := range r.inputs {
		in.Close()
	}
	for _, out := range r.outputs {
		out.from.Close()
	}
}

func (r *running) openPipes(c command) (theirs []*os.File, err error) {
	var in *os.File
	if c.stdin == nil {
		in, err = os.Open(os.DevNull)
	} else {
		var ours *os.File
		if in, ours, err = os.Pipe(); err == nil {
			r.inputs = append(r.inputs, ours)
		}
	}
	if err != nil {
		return nil, err
	}
	theirs = append(theirs, in)
	for _, to := range []io.Writer{c.stdout, c.stderr} {
		ours, write, err := os.Pipe()
		if err != nil {
			return theirs, err
		}
		theirs = append(theirs, write)
		r.outputs = append(r.outputs, &pump{from: ours, to: to})
	}
	return theirs, nil
}

func (r *running) openTerminal(c command) (theirs []*os.File, err error) {
	master, slave, err := pty.Open()
	if err != nil {
		return nil, err
	}
	defer master.Close()
	if c.size.Rows > 0 && c.size.Cols > 0 {
		if err := pty.Setsize(slave, &c.size); err != nil {
			slave.Close()
			return nil, err
		}
	}
	// The package leaves the master in blocking mode, where a read can be neither
	// interrupted nor given a deadline.
	fd, err := unix.FcntlInt(master.Fd(), unix.F_DUPFD_CLOEXEC, 3)
	if err == nil {
		err = unix.SetNonblock(fd, true)
	}
	if err != nil {
		slave.Close()
		return nil, err
	}
	r.terminal = os.NewFile(uintptr(fd), master.Name())
	r.outputs = append(r.outputs, &pump{from: r.terminal, to: c.stdout})
	return []*os.File{slave, slave, slave}, nil
}

// pump moves one stream of a running command.
type pump struct {
	from *os.File
	to   io.Writer
	done chan struct{}
	mu   sync.Mutex
	rest int // once > 0: how many more bytes are read after the command's end
}

// What is read after a command has ended and everything of it was killed: what
// pipes still hold. Whoever escaped and goes on writing is not listened to.
const (
	restBytes = 2 << 20
	restWait  = 500 * time.Millisecond
	graceWait = 500 * time.Millisecond // for a process that is still flushing
	termWait  = 2 * time.Second        // between SIGTERM and SIGKILL
)

func (r *running) pump(c command) {
	for _, p := range r.outputs {
		p.done = make(chan struct{})
		go func() {
			defer close(p.done)
			if err := p.run(); err != nil {
				r.failOnce.Do(func() { close(r.failed) })
			}
		}()
	}
	if c.stdin == nil {
		return
	}
	if closer, ok := c.stdin.(io.Closer); ok {
		r.inputs = append(r.inputs, closer)
	}
	if r.terminal != nil {
		r.feeding.Go(func() {
			if _, err := io.Copy(onlyWriter{r.terminal}, c.stdin); err == nil {
				_, _ = r.terminal.Write([]byte{4}) // end of input, on a terminal
			}
		})
		return
	}
	to := r.inputs[0].(*os.File)
	r.feeding.Go(func() {
		_, _ = io.Copy(onlyWriter{to}, c.stdin) // an error means: it is not read any more
		to.Close()
	})
}

// onlyWriter hides a file's ReadFrom, which would hold back what is there until
// more comes.
type onlyWriter struct{ to *os.File }

func (w onlyWriter) Write(p []byte) (int, error) { return w.to.Write(p) }

// run copies until the other side is closed. Its error is the writer's: where
// the command's output comes to no end by itself, a reader that is gone ends it.
func (p *pump) run() error {
	buffer := make([]byte, 32<<10)
	for {
		n, err := p.from.Read(buffer)
		if n > 0 {
			if _, err := p.to.Write(buffer[:n]); err != nil {
				return err
			}
		}
		if err != nil || p.spent(n) {
			return nil // EOF; EIO of a terminal without processes; the deadline
		}
	}
}

// spent reports whether enough was read after the end.
func (p *pump) spent(n int) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.rest == 0 {
		return false
	}
	p.rest = max(p.rest-n, 1)
	p.from.SetReadDeadline(time.Now().Add(restWait))
	return p.rest == 1
}

func (p *pump) finish() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.rest = restBytes
	p.from.SetReadDeadline(time.Now().Add(restWait))
}

// Reasons for which a command is ended.
const (
	reasonTimeout = "timeout"
	reasonGone    = "the caller went away"
	reasonStopped = "stopped"
)

// wait returns when the command and all that it started are gone and the output
// was delivered. It ends the command when ctx ends, the timeout passes, stop is
// closed or its output cannot be delivered.
func (r *running) wait(ctx context.Context, timeout time.Duration, stop <-chan struct{}) {
	timer := time.NewTimer(timeout)
	defer timer.Stop()
	select {
	case <-r.child.over:
	case <-timer.C:
		r.terminate(reasonTimeout)
	case <-stop:
		r.terminate(reasonStopped)
	case <-ctx.Done():
		r.x.children.kill(r.child, reasonGone)
	case <-r.failed:
		r.x.children.kill(r.child, reasonGone)
	}
	<-r.child.over // only SIGKILL is left by now
	if r.child.killed() == "" {
		r.drain(graceWait)
	}
	r.x.children.sweep(r.child)
	for _, p := range r.outputs {
		p.finish()
	}
	for _, in := range r.inputs {
		in.Close()
	}
	for _, p := range r.outputs {
		<-p.done
		p.from.Close()
	}
	r.feeding.Wait()
}

// terminate asks, then kills.
func (r *running) terminate(reason string) {
	r.child.mu.Lock()
	r.child.reason = reason
	r.child.mu.Unlock()
	r.x.children.signal(r.child, unix.SIGTERM)
	timer := time.NewTimer(termWait)
	defer timer.Stop()
	select {
	case <-r.child.over:
	case <-timer.C:
		r.x.children.kill(r.child, reason)
	}
}

// drain waits for the outputs' end, at most so long.
func (r *running) drain(most time.Duration) {
	timer := time.NewTimer(most)
	defer timer.Stop()
	for _, p := range r.outputs {
		select {
		case <-p.done:
		case <-timer.C:
			return
		}
	}
}

// resize sets the terminal's size; without a terminal it does nothing.
func (r *running) resize(rows, cols uint16) {
	if r.terminal == nil || rows == 0 || cols == 0 {
		return
	}
	r.control(func(fd int) {
		unix.IoctlSetWinsize(fd, unix.TIOCSWINSZ, &unix.Winsize{Row: rows, Col: cols})
	})
}

func (r *running) control(f func(fd int)) {
	if raw, err := r.terminal.SyscallConn(); err == nil {
		_ = raw.Control(func(fd uintptr) { f(int(fd)) })
	}
}

// signal reaches the command's process group; on a terminal, the group in the
// foreground, as a key would.
func (r *running) signal(sig unix.Signal) {
	if r.terminal == nil || sig == unix.SIGKILL {
		r.x.children.signal(r.child, sig)
		return
	}
	group, err := 0, error(nil)
	r.control(func(fd int) { group, err = unix.IoctlGetInt(fd, unix.TIOCGPGRP) })
	key := map[unix.Signal]byte{unix.SIGINT: 3, unix.SIGQUIT: 28}[sig]
	switch {
	case err == nil && group > 1 && group != r.child.pid:
		unix.Kill(-group, sig)
	case err != nil && key != 0: // gVisor does not tell the group: press the key
		_, _ = r.terminal.Write([]byte{key})
	default:
		r.x.children.signal(r.child, sig)
	}
}
