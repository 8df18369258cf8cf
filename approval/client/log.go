package client

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"cal/nucleus"
)

const (
	logTimeout = 5 * time.Minute
	maxLogFile = 64 << 20
	maxLog     = 16 << 30
)

// Log copies the authority's own log into a directory, which is empty. What it is worth is found
// out by audit.Verify, under the key that Info names.
func (c *Client) Log(ctx context.Context, dir string) error {
	ctx, cancel := context.WithTimeout(ctx, logTimeout)
	defer cancel()
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://authority/v1/log", nil)
	if err != nil {
		return err
	}
	response, err := c.http.Do(request)
	if err != nil {
		return nucleus.Errorf(nucleus.KindUnavailable, "no authority answers at %s: %v", c.socket, cause(err))
	}
	defer response.Body.Close()
	if response.StatusCode != http.StatusOK {
		raw, err := io.ReadAll(io.LimitReader(response.Body, 64<<10))
		if err != nil {
			return nucleus.Errorf(nucleus.KindUnavailable, "the authority at %s broke off: %v", c.socket, err)
		}
		return refusal(response.StatusCode, raw)
	}
	if err := unpack(dir, io.LimitReader(response.Body, maxLog)); err != nil {
		return nucleus.Errorf(nucleus.KindUnavailable, "the log of the authority at %s: %v", c.socket, err)
	}
	return nil
}

// unpack writes the files of a tar, by who is not trusted, below a directory.
func unpack(dir string, r io.Reader) error {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer root.Close()
	for archive := tar.NewReader(r); ; {
		header, err := archive.Next()
		switch {
		case errors.Is(err, io.EOF):
			return nil
		case err != nil:
			return err
		case header.Typeflag != tar.TypeReg || header.Size > maxLogFile:
			return fmt.Errorf("%q is no file of a log", header.Name)
		}
		if err := unpackOne(root, header.Name, archive); err != nil {
			return err
		}
	}
}

func unpackOne(root *os.Root, name string, r io.Reader) error {
	if err := root.MkdirAll(filepath.Dir(name), 0o700); err != nil {
		return err
	}
	f, err := root.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = io.Copy(f, r)
	return errors.Join(err, f.Close())
}
