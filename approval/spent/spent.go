// Package spent keeps the grants that were used: each is good for one effect, or for as many
// as its task says.
//
// The threat is a grant that works twice: sent again, sent by two callers at
// once, or sent after a crash between the use and its record. Use is durable
// before it returns, so that whoever calls it before the effect can lose a grant
// in a crash and can never use one twice.
//
// Who can change or delete the database's file undoes that; it belongs to the
// user that acts on grants and to nobody else.
package spent

import (
	"database/sql"
	"errors"
	"fmt"
	"net/url"
	"os"
	"path/filepath"

	_ "modernc.org/sqlite" // the driver "sqlite"

	"cal/nucleus"
)

// ErrUsed is the error of a grant that was used before.
var ErrUsed = errors.New("grant was used before")

// Store is the set of used grants in one file. Several processes may use one
// file; its methods may be called at the same time.
type Store struct{ db *sql.DB }

const schema = `CREATE TABLE IF NOT EXISTS spent (
	jti TEXT PRIMARY KEY,
	ask TEXT NOT NULL,
	pod TEXT NOT NULL,
	digest TEXT NOT NULL,
	expires_ms INTEGER NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS uses (
	ask TEXT NOT NULL,
	n INTEGER NOT NULL,
	permit TEXT NOT NULL,
	PRIMARY KEY (ask, n)
) STRICT`

// Open opens the store at path and makes it, readable for its owner only, if
// there is none. A file that is no such store, or a damaged one, is an error.
func Open(path string) (*Store, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("used grants: %w", err)
	}
	if err := errors.Join(f.Sync(), f.Close(), syncDir(filepath.Dir(path))); err != nil {
		return nil, fmt.Errorf("used grants: %w", err)
	}
	// FULL: in WAL mode the default would lose the last commits with the power.
	dsn := url.URL{Scheme: "file", OmitHost: true, Path: path, RawQuery: "_txlock=immediate&_pragma=busy_timeout(5000)&_pragma=journal_mode(WAL)&_pragma=synchronous(FULL)"}
	db, err := sql.Open("sqlite", dsn.String())
	if err != nil {
		return nil, fmt.Errorf("used grants %s: %w", path, err)
	}
	db.SetMaxOpenConns(1)
	if err := prepare(db); err != nil {
		return nil, errors.Join(fmt.Errorf("used grants %s: %w", path, err), db.Close())
	}
	return &Store{db}, nil
}

func prepare(db *sql.DB) error {
	var mode, check string
	if err := db.QueryRow("PRAGMA journal_mode").Scan(&mode); err != nil {
		return err
	}
	if err := db.QueryRow("PRAGMA quick_check(1)").Scan(&check); err != nil {
		return err
	}
	if mode != "wal" || check != "ok" {
		return fmt.Errorf("journal mode %q, check %q", mode, check)
	}
	_, err := db.Exec(schema)
	return err
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// Close releases the file.
func (s *Store) Close() error { return s.db.Close() }

// Use marks the verified grants of one ask as used, all of them or none, durably, and must
// return before the effect starts. It returns ErrUsed where one was used before; any other
// error means that nobody can say, and the effect must not start.
func (s *Store) Use(grants ...nucleus.Grant) error {
	if len(grants) == 0 {
		return errors.New("no grant to use")
	}
	tx, err := s.db.Begin()
	if err != nil {
		return fmt.Errorf("using grant %s: %w", grants[0].ID, err)
	}
	defer func() { _ = tx.Rollback() }() // after Commit it does nothing
	for _, grant := range grants {
		if grant.ID == "" {
			return errors.New("grant has no id")
		}
		result, err := tx.Exec("INSERT INTO spent VALUES (?, ?, ?, ?, ?) ON CONFLICT DO NOTHING",
			grant.ID, grant.Ask, grant.Pod, grant.Digest, grant.Expires)
		if err != nil {
			return fmt.Errorf("using grant %s: %w", grant.ID, err)
		}
		added, err := result.RowsAffected()
		if err != nil {
			return fmt.Errorf("using grant %s: %w", grant.ID, err)
		}
		if added == 0 {
			return fmt.Errorf("grant %s: %w", grant.ID, ErrUsed)
		}
	}
	if err := tx.Commit(); err != nil {
		return fmt.Errorf("using grant %s: %w", grants[0].ID, err)
	}
	return nil
}

// Again counts one use of a task that was granted for an ask, durably, and must return, like Use,
// before the effect starts. n counts from 1; beyond most it returns ErrUsed.
func (s *Store) Again(ask string, most int, permit string) (n int, err error) {
	fail := func(err error) (int, error) { return 0, fmt.Errorf("using ask %s: %w", ask, err) }
	tx, err := s.db.Begin()
	if err != nil {
		return fail(err)
	}
	defer func() { _ = tx.Rollback() }() // after Commit it does nothing
	if err := tx.QueryRow("SELECT COALESCE(MAX(n), 0) + 1 FROM uses WHERE ask = ?", ask).Scan(&n); err != nil {
		return fail(err)
	}
	if n > most {
		return fail(ErrUsed)
	}
	if _, err := tx.Exec("INSERT INTO uses VALUES (?, ?, ?)", ask, n, permit); err != nil {
		return fail(err)
	}
	if err := tx.Commit(); err != nil {
		return fail(err)
	}
	return n, nil
}
