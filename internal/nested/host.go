package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// host is the first process of the emulated host.
func host() {
	err := serve()
	said := "passed"
	if err != nil {
		said = err.Error()
	}
	fmt.Printf("\n%s %s\n", verdictWord, strings.ReplaceAll(said, "\n", "; "))
	unix.Sync()
	time.Sleep(time.Second) // the serial port is slow, and a reset does not wait for it
	_ = unix.Reboot(unix.LINUX_REBOOT_CMD_RESTART)
	select {}
}

func serve() error {
	if err := moveRoot(); err != nil {
		return fmt.Errorf("root: %w", err)
	}
	if err := mountAll(); err != nil {
		return err
	}
	data, err := os.ReadFile("/plan.json")
	if err != nil {
		return err
	}
	var p plan
	if err := json.Unmarshal(data, &p); err != nil {
		return err
	}
	for _, module := range p.Modules {
		if err := loadModule("/modules/" + module); err != nil {
			return fmt.Errorf("module %s: %w", module, err)
		}
	}
	if err := mountDisk(); err != nil {
		return fmt.Errorf("disk: %w", err)
	}
	if err := loopback(); err != nil {
		return fmt.Errorf("loopback: %w", err)
	}
	return p.run()
}

// moveRoot goes from the initramfs, which cannot be pivoted away, to a tmpfs.
func moveRoot() error {
	if err := unix.Mount("tmpfs", "/new", "tmpfs", 0, "size=90%,mode=755"); err != nil {
		return err
	}
	err := filepath.WalkDir("/", func(path string, entry fs.DirEntry, err error) error {
		if err != nil || path == "/" {
			return err
		}
		if path == "/new" {
			return fs.SkipDir
		}
		return move(path, entry)
	})
	if err != nil {
		return err
	}
	for name, target := range map[string]string{"bin": "usr/bin", "sbin": "usr/sbin", "lib": "usr/lib", "lib64": "usr/lib64"} {
		if err := os.Symlink(target, "/new/"+name); err != nil {
			return err
		}
	}
	if err := os.Chdir("/new"); err != nil {
		return err
	}
	return errors.Join(unix.Mount(".", "/", "", unix.MS_MOVE, ""), unix.Chroot("."), os.Chdir("/"))
}

// move copies a directory or a file and frees the room of the file.
func move(path string, entry fs.DirEntry) error {
	info, err := entry.Info()
	if err != nil {
		return err
	}
	switch {
	case entry.IsDir():
		return os.Mkdir("/new"+path, info.Mode().Perm())
	case !entry.Type().IsRegular():
		return nil
	}
	from, err := os.Open(path)
	if err != nil {
		return err
	}
	defer from.Close()
	to, err := os.OpenFile("/new"+path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, info.Mode().Perm())
	if err != nil {
		return err
	}
	_, err = io.Copy(to, from)
	return errors.Join(err, to.Close(), os.Remove(path))
}

func mountAll() error {
	for _, m := range [][3]string{
		{"proc", "/proc", "proc"}, {"sysfs", "/sys", "sysfs"}, {"devtmpfs", "/dev", "devtmpfs"}, {"cgroup2", "/sys/fs/cgroup", "cgroup2"},
	} {
		if err := unix.Mount(m[0], m[1], m[2], 0, ""); err != nil {
			return fmt.Errorf("mounting %s: %w", m[1], err)
		}
	}
	for _, dir := range []string{"/tmp", "/var/tmp"} {
		if err := os.Chmod(dir, 0o1777); err != nil {
			return err
		}
	}
	return os.WriteFile("/sys/fs/cgroup/cgroup.subtree_control", []byte("+cpu +memory +pids +io"), 0)
}

// machinesAt is where the disk of the emulated host is mounted.
const machinesAt = "/var/tmp"

// mountDisk mounts it and puts the store of images there, beside the machines: what they
// share has a second name in each jail.
func mountDisk() error {
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		err := unix.Mount("/dev/vda", machinesAt, "ext4", 0, "")
		if err == nil {
			break
		}
		if time.Now().After(deadline) { // the device comes when its driver has looked
			return err
		}
	}
	if err := os.Chmod(machinesAt, 0o1777); err != nil {
		return err
	}
	return os.CopyFS(machinesAt+"/images", os.DirFS("/"+work+"/images"))
}

func loadModule(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.FinitModule(int(f.Fd()), "", 0); err != nil && !errors.Is(err, unix.EEXIST) {
		return err
	}
	return nil
}

func loopback() error {
	request, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	request.SetUint16(unix.IFF_UP)
	if err := unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, request); err != nil {
		return err
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	return listener.Close()
}

const tries = 3

// run runs each test in a process of its own and counts.
func (p plan) run() error {
	var failed []string
	passed, skipped, again := 0, 0, 0
	for _, name := range p.Tests {
		for try := 1; ; try++ {
			fmt.Printf("nested: run %s\n", name)
			started := time.Now()
			output, err := p.test(name)
			text := strings.TrimRight(output, "\n")
			switch {
			case err == nil && strings.Contains(output, "\n--- SKIP: "+strings.SplitN(name, "/", 2)[0]+" "):
				skipped++
				fmt.Printf("nested: SKIP %s\n%s\n", name, text)
			case err == nil:
				passed++
				fmt.Printf("nested: pass %s (%.1f s)\n%s\n", name, time.Since(started).Seconds(), text)
			case strings.Contains(output, shutdownWord) && try < tries:
				again++
				fmt.Printf("nested: AGAIN %s: a guest ended with Shutdown (%v)\n%s\n", name, err, text)
				continue
			default:
				failed = append(failed, name)
				fmt.Printf("nested: FAIL %s (%.1f s): %v\n%s\n", name, time.Since(started).Seconds(), err, text)
			}
			break
		}
	}
	fmt.Printf("nested: %d passed, %d failed, %d skipped; %d times tried again because a guest ended with Shutdown\n", passed, len(failed), skipped, again)
	if len(failed) > 0 {
		return fmt.Errorf("%d of %d failed: %s", len(failed), len(p.Tests), strings.Join(failed, ", "))
	}
	return nil
}

// shutdownWord is what Firecracker logs of a guest whose processor gave up. A guest that
// ends by itself resets the keyboard controller and is not among them.
const shutdownWord = "Unexpected exit reason on vcpu run: Shutdown"

// Bounds of one test. Where its own fails, because the process itself hangs, what it ran is
// looked at and all of it is ended.
const (
	testTimeout = 10 * time.Minute
	hungTimeout = testTimeout + time.Minute
)

func (p plan) test(name string) (string, error) {
	var parts []string
	for part := range strings.SplitSeq(name, "/") {
		parts = append(parts, "^"+strings.ReplaceAll(part, " ", "_")+"$")
	}
	ctx, cancel := context.WithTimeout(context.Background(), hungTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, p.Binary, "-test.run", strings.Join(parts, "/"), "-test.v", "-test.timeout", testTimeout.String())
	cmd.Dir, cmd.Env = "/"+work, p.Env
	cmd.Cancel = func() error {
		fmt.Printf("nested: %s hangs; what runs:\n%s", name, processes())
		return cmd.Process.Signal(unix.SIGQUIT)
	}
	cmd.WaitDelay = 20 * time.Second // then it is killed, and what holds its output is not waited for
	output, err := cmd.CombinedOutput()
	return string(output), err
}

// processes says of each thread of each program what it is doing.
func processes() string {
	var text strings.Builder
	tasks, _ := filepath.Glob("/proc/[0-9]*/task/*")
	for _, task := range tasks {
		args, err := os.ReadFile(filepath.Join(task, "cmdline"))
		if err != nil || len(args) == 0 { // the kernel's
			continue
		}
		stat, _ := os.ReadFile(filepath.Join(task, "stat"))
		stack, _ := os.ReadFile(filepath.Join(task, "stack"))
		_, state, _ := strings.Cut(string(stat), ") ")
		fmt.Fprintf(&text, "%s %.1s %.80q %s\n", strings.TrimPrefix(task, "/proc/"), state, args, strings.ReplaceAll(strings.TrimSpace(string(stack)), "\n", " "))
	}
	return text.String()
}
