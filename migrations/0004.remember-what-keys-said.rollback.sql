DROP FUNCTION follow_sender;

ALTER TABLE dedup_keys
    DROP COLUMN description,
    DROP COLUMN labels,
    DROP COLUMN started_at,
    DROP COLUMN changed_at;
