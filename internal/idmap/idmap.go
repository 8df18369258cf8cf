// Package idmap runs programs where an ordinary user's subordinate ids exist: in
// a user namespace of the person's own, in which the person is 0 and the ids that
// /etc/subuid and /etc/subgid give follow from 1 on.
//
// What is started there has every right over the person's files and over those
// ids', and none over anybody else's: the supplementary groups are given up. The
// map itself is written by the host's newuidmap and newgidmap, which check it
// against those two files; this package holds no right that the person lacks.
package idmap

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// Map is what a person's namespace holds besides the person: Count ids of users
// from the host's UID on, and as many of groups from GID on.
type Map struct {
	UID   uint32 `json:"uid"`
	GID   uint32 `json:"gid"`
	Count uint32 `json:"count"`
}

// Inner returns the id in the namespace of a host's user.
func (m Map) Inner(uid uint32) (inner uint32, ok bool) {
	return uid - m.UID + 1, m.Count > 0 && uid >= m.UID && uid-m.UID < m.Count
}

// Outer returns the host's user of an id in the namespace that is not 0, the person.
func (m Map) Outer(inner uint32) uint32 { return m.UID + inner - 1 }

// Missing says why a person has no map, and what to do.
type Missing struct{ Cause, Mend string }

func (e *Missing) Error() string { return e.Cause + " (" + e.Mend + ")" }

const packages = "install newuidmap and newgidmap (Debian, Ubuntu: apt install uidmap; Fedora: dnf install shadow-utils)"

// Find returns the map of whoever runs this process, from the largest ranges
// that the two files give. A *Missing says that there is none.
func Find() (Map, error) { return find("/etc") }

func find(etc string) (Map, error) {
	uid := strconv.Itoa(os.Getuid())
	name := uid
	if known, err := user.LookupId(uid); err == nil {
		name = known.Username
	}
	uids, err := largest(filepath.Join(etc, "subuid"), name, uid)
	if err != nil {
		return Map{}, err
	}
	gids, err := largest(filepath.Join(etc, "subgid"), name, uid)
	if err != nil {
		return Map{}, err
	}
	m := Map{UID: uids.first, GID: gids.first, Count: min(uids.count, gids.count)}
	if m.Count == 0 {
		return Map{}, &Missing{fmt.Sprintf("user %s has no subordinate ids in /etc/subuid and /etc/subgid", name),
			fmt.Sprintf("sudo usermod --add-subuids %[1]s --add-subgids %[1]s %[2]s", unused(etc), name)}
	}
	for _, program := range []string{"newuidmap", "newgidmap", "setpriv"} {
		if _, err := exec.LookPath(program); err != nil {
			return Map{}, &Missing{program + " is not installed", packages}
		}
	}
	return m, nil
}

// unused is a range that nobody has in either file, FIRST-LAST.
func unused(etc string) string {
	const usual, count = 100000, 65536 // where useradd begins, and what it gives
	first := uint64(usual)
	for _, file := range []string{"subuid", "subgid"} {
		data, _ := os.ReadFile(filepath.Join(etc, file)) // none: nobody has a range
		for line := range strings.Lines(string(data)) {
			if _, given, err := parseSpan(line); err == nil {
				first = max(first, uint64(given.first)+uint64(given.count))
			}
		}
	}
	return fmt.Sprintf("%d-%d", first, first+count-1)
}

type span struct{ first, count uint32 }

// parseSpan reads a line NAME:FIRST:COUNT.
func parseSpan(line string) (name string, s span, err error) {
	fields := strings.Split(strings.TrimSpace(line), ":")
	if len(fields) != 3 {
		return "", span{}, fmt.Errorf("%q is not NAME:FIRST:COUNT", line)
	}
	first, err := strconv.ParseUint(fields[1], 10, 32)
	if err != nil {
		return "", span{}, err
	}
	count, err := strconv.ParseUint(fields[2], 10, 32)
	if err != nil {
		return "", span{}, err
	}
	if first+count > 1<<32-1 {
		return "", span{}, fmt.Errorf("%q goes beyond the last id", line)
	}
	return fields[0], span{uint32(first), uint32(count)}, nil
}

// largest reads lines NAME:FIRST:COUNT, where NAME may be a number.
func largest(file, name, uid string) (best span, err error) {
	data, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		return span{}, nil
	}
	if err != nil {
		return span{}, err
	}
	for line := range strings.Lines(string(data)) {
		whose, given, err := parseSpan(line)
		// Host ids below 1000 are the system's, whoever gave them away.
		if err == nil && (whose == name || whose == uid) && given.first >= 1000 && given.count > best.count {
			best = given
		}
	}
	return best, nil
}

// inside waits for its map, then gives up the groups that the person has on the
// host, and becomes the program.
const inside = `read -r go <&%d && exec %d<&- && exec setpriv --clear-groups -- "$@"`

// Start starts cmd under the map, as 0. Its descriptors are as the caller set
// them; its SysProcAttr too, but for the namespace. The caller waits for it.
func (m Map) Start(cmd *exec.Cmd) error {
	ours, theirs, err := pipe()
	if err != nil {
		return err
	}
	defer ours.Close()
	fd := 3 + len(cmd.ExtraFiles)
	if fd > 9 {
		return fmt.Errorf("%d files are too many to hand over", len(cmd.ExtraFiles))
	}
	cmd.ExtraFiles = append(cmd.ExtraFiles[:fd-3:fd-3], theirs)
	cmd.Args = append([]string{"sh", "-c", fmt.Sprintf(inside, fd, fd), "sh", cmd.Path}, cmd.Args[1:]...)
	cmd.Path = "/bin/sh"
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	cmd.SysProcAttr.Cloneflags |= syscall.CLONE_NEWUSER
	err = cmd.Start()
	theirs.Close()
	if err != nil {
		return fmt.Errorf("user namespace: %w", err)
	}
	if err = m.write(cmd.Process.Pid); err == nil {
		_, err = ours.Write([]byte("\n"))
	}
	if err != nil {
		ours.Close() // sh reads no line, and ends
		return errors.Join(err, discard(cmd.Wait()))
	}
	return nil
}

// discard drops the expected end of a program that was not let begin.
func discard(err error) error {
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return nil
	}
	return err
}

func pipe() (ours, theirs *os.File, err error) {
	var fds [2]int
	if err := unix.Pipe2(fds[:], unix.O_CLOEXEC); err != nil {
		return nil, nil, err
	}
	return os.NewFile(uintptr(fds[1]), "go"), os.NewFile(uintptr(fds[0]), "go"), nil
}

func (m Map) write(pid int) error {
	for _, kind := range []struct {
		program    string
		own, first uint32
	}{{"newuidmap", uint32(os.Getuid()), m.UID}, {"newgidmap", uint32(os.Getgid()), m.GID}} {
		cmd := exec.Command(kind.program, fmt.Sprint(pid), "0", fmt.Sprint(kind.own), "1", "1", fmt.Sprint(kind.first), fmt.Sprint(m.Count))
		if output, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("%s: %w: %s", kind.program, err, bytes.TrimSpace(output))
		}
	}
	return nil
}

// Run runs a program under the map to its end and returns what it wrote.
func (m Map) Run(ctx context.Context, args ...string) ([]byte, error) {
	path, err := exec.LookPath(args[0])
	if err != nil {
		return nil, err
	}
	cmd := exec.CommandContext(ctx, path, args[1:]...)
	cmd.Dir = "/"
	var wrote, said bytes.Buffer
	cmd.Stdout, cmd.Stderr = &wrote, &said
	if err := m.Start(cmd); err != nil {
		return nil, err
	}
	if err := cmd.Wait(); err != nil {
		return nil, fmt.Errorf("%s: %w: %s", args[0], err, bytes.TrimSpace(said.Bytes()))
	}
	return wrote.Bytes(), nil
}

// Try proves that the map can be made and that nobody's groups remain in it.
func (m Map) Try(ctx context.Context) error {
	_, err := m.Run(ctx, "sh", "-c", `while read -r name groups; do [ "$name" != Groups: ] || [ -z "$groups" ] || exit 3; done </proc/self/status`)
	return err
}

// open gives the person all rights over the person's own directories: a machine
// may have taken them away.
func open(path string) error {
	return filepath.WalkDir(path, func(name string, entry fs.DirEntry, err error) error {
		if err == nil && entry.IsDir() {
			err = os.Chmod(name, 0o700)
		}
		return err
	})
}

// RemoveAll removes what a person's machines left: where files belong to a
// subordinate id, by a child under the person's map. It follows no link.
func RemoveAll(ctx context.Context, path string) error {
	err := os.RemoveAll(path)
	if os.Geteuid() == 0 || !errors.Is(err, fs.ErrPermission) {
		return err
	}
	if opened := open(path); opened == nil {
		if err = os.RemoveAll(path); !errors.Is(err, fs.ErrPermission) {
			return err
		}
	}
	m, missing := Find()
	if missing != nil {
		return fmt.Errorf("%w; what belongs to a subordinate id can be removed by its person alone: %w; or sudo rm -rf %s", err, missing, path)
	}
	if path, err = filepath.Abs(path); err != nil {
		return err
	}
	if _, err := m.Run(ctx, "rm", "-rf", "--", path); err != nil {
		return err
	}
	if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%s is still there: %w", path, err)
	}
	return nil
}
