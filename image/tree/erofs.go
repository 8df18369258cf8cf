package tree

import (
	"bytes"
	"io"
	"io/fs"
	"time"

	"github.com/erofs/go-erofs"
)

// WriteEROFS writes the tree as an EROFS image. The same tree gives the same bytes.
func (t *Tree) WriteEROFS(out io.WriteSeeker) error {
	// No entry has the time of the build; zero lets those without a time be small.
	w := erofs.Create(out, erofs.WithBuildTime(0, 0))
	if err := w.CopyFrom(view{t}); err != nil {
		return err
	}
	return w.Close()
}

// view shows a tree as the fs.FS that the writer reads.
type view struct{ t *Tree }

func (v view) find(op, name string) (*node, error) {
	if n := v.t.at(name); n != nil {
		return n, nil
	}
	return nil, &fs.PathError{Op: op, Path: name, Err: fs.ErrNotExist}
}

func (v view) Stat(name string) (fs.FileInfo, error) {
	n, err := v.find("stat", name)
	return info{n}, err
}

func (v view) ReadDir(name string) ([]fs.DirEntry, error) {
	n, err := v.find("readdir", name)
	if err != nil {
		return nil, err
	}
	entries := make([]fs.DirEntry, 0, len(n.children))
	for _, child := range n.sorted() {
		entries = append(entries, fs.FileInfoToDirEntry(info{child}))
	}
	return entries, nil
}

func (v view) ReadLink(name string) (string, error) {
	n, err := v.find("readlink", name)
	if err != nil {
		return "", err
	}
	return n.target, nil
}

func (v view) Open(name string) (fs.File, error) {
	n, err := v.find("open", name)
	if err != nil {
		return nil, err
	}
	if n.source == "" {
		return file{info{n}, io.NopCloser(bytes.NewReader(n.data))}, nil
	}
	return file{info{n}, &content{n: n}}, nil
}

type file struct {
	info
	io.ReadCloser
}

func (f file) Stat() (fs.FileInfo, error) { return f.info, nil }

// info is what the writer learns of an entry: nothing of it is the host's.
type info struct{ n *node }

func (i info) Name() string       { return i.n.name }
func (i info) Size() int64        { return i.n.size }
func (i info) Mode() fs.FileMode  { return i.n.mode }
func (i info) ModTime() time.Time { return time.Unix(i.n.mtime, 0) }
func (i info) IsDir() bool        { return i.n.mode.IsDir() }

func (i info) Sys() any {
	links := 1
	if i.IsDir() {
		links = 2
		for _, child := range i.n.children {
			if child.mode.IsDir() {
				links++
			}
		}
	}
	return &erofs.Stat{Mtime: uint64(i.n.mtime), Nlink: links}
}
