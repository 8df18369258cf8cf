package unpack

import (
	"bufio"
	"bytes"
	"compress/bzip2"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"strings"

	"github.com/klauspost/compress/zstd"
)

// mostWindow bounds what a zstd stream may make its reader keep in memory.
const mostWindow = 128 << 20

// PlainStream returns the content of a compressed stream, whose format is known by its first
// bytes: gzip, zstd, bzip2, xz where the host has the program, or none.
func PlainStream(ctx context.Context, r io.Reader) (io.ReadCloser, error) {
	buffered := bufio.NewReaderSize(r, 64<<10)
	head, err := buffered.Peek(6)
	if err != nil && err != io.EOF {
		return nil, err
	}
	switch {
	case bytes.HasPrefix(head, []byte{0x1f, 0x8b}):
		return gzip.NewReader(buffered)
	case bytes.HasPrefix(head, []byte{0x28, 0xb5, 0x2f, 0xfd}):
		d, err := zstd.NewReader(buffered, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(mostWindow))
		if err != nil {
			return nil, err
		}
		return d.IOReadCloser(), nil
	case bytes.HasPrefix(head, []byte("BZh")):
		return io.NopCloser(bzip2.NewReader(buffered)), nil
	case bytes.HasPrefix(head, []byte("\xfd7zXZ\x00")):
		return program(ctx, buffered, "xz", "--decompress", "--stdout", "--memlimit-decompress=256MiB")
	}
	return io.NopCloser(buffered), nil
}

// program runs a decompressor; Close waits for it.
func program(ctx context.Context, in io.Reader, name string, args ...string) (io.ReadCloser, error) {
	path, err := exec.LookPath(name)
	if err != nil {
		return nil, fmt.Errorf("it is compressed with %s, which this host has not; hint: install it, or compress with gzip", name)
	}
	cmd := exec.CommandContext(ctx, path, args...)
	cmd.Stdin, cmd.Env = in, []string{"PATH=/usr/bin:/bin", "LC_ALL=C"}
	p := &piped{cmd: cmd}
	cmd.Stderr = &p.said
	if p.ReadCloser, err = cmd.StdoutPipe(); err != nil {
		return nil, err
	}
	return p, cmd.Start()
}

type piped struct {
	io.ReadCloser
	cmd   *exec.Cmd
	said  strings.Builder
	ended bool
	err   error
}

// Read fails at the end where the program did.
func (p *piped) Read(b []byte) (int, error) {
	n, err := p.ReadCloser.Read(b)
	if err == io.EOF {
		if waitErr := p.wait(); waitErr != nil {
			err = waitErr
		}
	}
	return n, err
}

func (p *piped) wait() error {
	if !p.ended {
		p.ended = true
		if p.err = p.cmd.Wait(); p.err != nil {
			p.err = fmt.Errorf("%s: %w: %s", p.cmd.Path, p.err, strings.TrimSpace(p.said.String()))
		}
	}
	return p.err
}

func (p *piped) Close() error {
	if p.ended {
		return nil
	}
	p.cmd.Process.Kill()
	err := p.ReadCloser.Close()
	p.wait() //nolint:errcheck // it was killed
	if errors.Is(err, io.ErrClosedPipe) {
		return nil
	}
	return err
}
