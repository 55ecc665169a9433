-- read
--
-- Which of these migrations the database lacks, and whether it refuses writes, because it is a
-- standby or was set to read-only.
--   $1 migrations  text[]
SELECT coalesce(array_agg(name ORDER BY name), '{}') AS missing,
       current_setting('transaction_read_only')::boolean AS is_read_only
  FROM unnest($1::text[]) AS wanted (name)
 WHERE NOT EXISTS (SELECT FROM _yoyo_migration WHERE migration_id = name);
